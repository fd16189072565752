"""A tensor as it is stored: its name, element format, shape and bytes, mapped from the file until used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class TensorFormat(Enum):
    """How elements are stored. Block formats hold `block_elements` consecutive elements in `block_bytes`.

    The value is the name used in messages and by the native converter. Layouts of the GGUF blocks:
    ggml-common.h of ggml-org/ggml (q8_0: f16 scale, 32 x int8; q4_0: f16 scale, 16 bytes of two 4-bit, value
    (n - 8) * scale; q4_1: f16 scale, f16 minimum, 16 bytes, value n * scale + minimum; low nibbles are
    elements 0..15).
    """

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"

    @property
    def block_elements(self) -> int:
        return 32 if self in (TensorFormat.Q8_0, TensorFormat.Q4_0, TensorFormat.Q4_1) else 1

    @property
    def block_bytes(self) -> int:
        return _BLOCK_BYTES[self]

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape; the last dimension must be a multiple of `block_elements`."""
        return (
            math.prod(shape) // self.block_elements * self.block_bytes
        )  # exact: hostile shapes pass 64 bits


_BLOCK_BYTES = {
    TensorFormat.F32: 4,
    TensorFormat.F16: 2,
    TensorFormat.BF16: 2,
    TensorFormat.Q8_0: 34,
    TensorFormat.Q4_0: 18,
    TensorFormat.Q4_1: 20,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor under its Hugging Face name. `data` is its bytes, row-major: mostly a read-only view of the
    mapped file, at any address (safetensors does not align its tensors).
    """

    name: str
    format: TensorFormat
    shape: tuple[int, ...]
    data: NDArray[np.uint8]  # [num_bytes]
