"""Memory that panels may lie in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64  # of panels (csrc/memory.h: kAlignment)


def aligned_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """So many bytes, uninitialized, where `Weight.from_panels` takes them."""
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes]
