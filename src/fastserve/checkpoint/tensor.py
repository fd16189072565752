"""A tensor as it is stored: its name, element format, shape and bytes, mapped from the file until used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class TensorFormat(Enum):
    """How elements are stored. Block formats hold `block_elements` consecutive elements in `block_bytes`.

    The value is the name used in messages and by the native converter. Layouts of the GGUF blocks:
    ggml-common.h of ggml-org/ggml (q8_0: f16 scale, 32 x int8; q4_0: f16 scale, 16 bytes of two 4-bit, value
    (n - 8) * scale; q4_1: f16 scale, f16 minimum, 16 bytes, value n * scale + minimum; low nibbles are
    elements 0..15; q5_0 and q5_1: the same with fifth bits in a word of 32; iq4_nl: as q4_0, by a table of 16
    values). The k formats hold 256 elements, in groups of 16 or 32 whose scales are whole numbers times that
    of the block.
    """

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q2_K = "q2_k"
    Q3_K = "q3_k"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    IQ4_NL = "iq4_nl"

    @property
    def block_elements(self) -> int:
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        return _BLOCKS[self][1]

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape; the last dimension must be a multiple of `block_elements`."""
        return (
            math.prod(shape) // self.block_elements * self.block_bytes
        )  # exact: hostile shapes pass 64 bits


_BLOCKS = {  # elements, bytes
    TensorFormat.F32: (1, 4),
    TensorFormat.F16: (1, 2),
    TensorFormat.BF16: (1, 2),
    TensorFormat.Q8_0: (32, 34),
    TensorFormat.Q4_0: (32, 18),
    TensorFormat.Q4_1: (32, 20),
    TensorFormat.Q5_0: (32, 22),
    TensorFormat.Q5_1: (32, 24),
    TensorFormat.Q2_K: (256, 84),
    TensorFormat.Q3_K: (256, 110),
    TensorFormat.Q4_K: (256, 144),
    TensorFormat.Q5_K: (256, 176),
    TensorFormat.Q6_K: (256, 210),
    TensorFormat.IQ4_NL: (32, 18),
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

    def rows(self, begin: int, end: int) -> StoredTensor:
        """Rows `begin` up to `end` of the first dimension."""
        row_bytes = self.format.num_bytes(self.shape[1:])
        data = self.data[begin * row_bytes : end * row_bytes]
        return StoredTensor(self.name, self.format, (end - begin, *self.shape[1:]), data)


class ComputedTensor(StoredTensor):
    """A tensor whose bytes are made of others, some rows at a time, when they are asked for: nothing is kept.

    Args:
        compute: the bytes of rows `begin` up to `end`.
    """

    __slots__ = ("_compute",)
    _compute: Callable[[int, int], NDArray[np.uint8]]

    def __init__(
        self,
        name: str,
        stored_format: TensorFormat,
        shape: tuple[int, ...],
        compute: Callable[[int, int], NDArray[np.uint8]],
    ) -> None:
        fields = (("name", name), ("format", stored_format), ("shape", shape), ("_compute", compute))
        for field, value in fields:
            object.__setattr__(self, field, value)

    @property
    def data(self) -> NDArray[np.uint8]:
        return self._compute(0, self.shape[0])

    def rows(self, begin: int, end: int) -> StoredTensor:
        shape = (end - begin, *self.shape[1:])
        return StoredTensor(self.name, self.format, shape, self._compute(begin, end))
