"""The C library's heap: one for all threads, and giving what was freed back to the system."""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # glibc, malloc.h


def trim_heap() -> None:
    """Have the C library give back what it keeps of freed memory, where it can: glibc's `malloc_trim`.

    It takes milliseconds, and holds up allocations meanwhile.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps little
        if trim is not None:
            trim(0)


def share_heap() -> None:
    """Have all threads share one heap, where the C library would give each one of its own: glibc's `mallopt`.

    What comes and goes in many heaps leaves holes in each. For a process that loads models again and again;
    to be called before there are threads.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_M_ARENA_MAX, 1)
