"""Giving memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """Have the C library give back what it keeps of freed memory, where it can: glibc's `malloc_trim`.

    It takes milliseconds, and holds up allocations meanwhile.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps little
        if trim is not None:
            trim(0)
