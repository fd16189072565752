"""Matrices that a checkpoint holds as whole numbers with scales, in several parts, under the one name of the
weight that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_float_format
from fastserve.checkpoint.tensor import ComputedTensor, TensorFormat
from fastserve.types import Float32Array


class Groups(NamedTuple):
    """Some rows of a grouped tensor: an element is (code - zero) * scale, by the group of its column."""

    codes: NDArray[np.int8]  # [rows, depth], from -2^(bits - 1) to 2^(bits - 1) - 1
    zeros: NDArray[np.int8] | None  # [rows, groups] in the same range; None: all are 0
    scales: Float32Array  # [rows, groups]


class GroupedTensor(ComputedTensor):
    """Whole numbers with a scale, and perhaps a zero point, for each row and group of columns.

    To those who read it as any other tensor it has the format of its scales, and the numbers that the
    library of its checkpoint's format dequantizes to: products are rounded to that format.

    Args:
        read: rows `begin` up to `end`.
        read_zeros: zero points of all rows, in any shape.

    Attributes:
        bits: of the whole numbers.
        group_size: columns that share a scale; those of the last group may be fewer.
        group_of_column: where groups are not of neighbouring columns: the group of each [depth].
    """

    __slots__ = ("_read", "_read_zeros", "bits", "group_of_column", "group_size")
    bits: int
    group_size: int
    group_of_column: NDArray[np.int32] | None
    _read: Callable[[int, int], Groups]
    _read_zeros: Callable[[], NDArray[np.int8] | None]

    def __init__(
        self,
        name: str,
        stored_format: TensorFormat,
        shape: tuple[int, int],
        read: Callable[[int, int], Groups],
        read_zeros: Callable[[], NDArray[np.int8] | None],
        *,
        bits: int,
        group_size: int,
        group_of_column: NDArray[np.int32] | None = None,
    ) -> None:
        super().__init__(name, stored_format, shape, self._dequantize)
        if group_of_column is not None and np.array_equal(group_of_column, _in_order(shape[1], group_size)):
            group_of_column = None
        fields = (
            ("bits", bits),
            ("group_size", group_size),
            ("group_of_column", group_of_column),
            ("_read", read),
            ("_read_zeros", read_zeros),
        )
        for field, value in fields:
            object.__setattr__(self, field, value)

    def groups(self, begin: int, end: int) -> Groups:
        """Rows `begin` up to `end`, as whole numbers and scales.

        Raises:
            CheckpointError: parts contradict each other.
        """
        groups = self._read(begin, end)
        return groups if groups.zeros is None or groups.zeros.any() else groups._replace(zeros=None)

    def has_zeros(self) -> bool:
        """Whether any zero point is not 0: all are read."""
        zeros = self._read_zeros()
        return zeros is not None and bool(zeros.any())

    @property
    def num_groups(self) -> int:
        """Of a row."""
        return -(-self.shape[1] // self.group_size)

    def column_groups(self) -> NDArray[np.int32]:
        """The group of each column."""
        of_column = self.group_of_column
        return _in_order(self.shape[1], self.group_size) if of_column is None else of_column

    def _dequantize(self, begin: int, end: int) -> NDArray[np.uint8]:
        groups = self.groups(begin, end)
        of_column = self.column_groups()
        # Exact in float32, so that the only rounding is the one to the format of the scales.
        values = groups.codes.astype(np.float32)
        if groups.zeros is not None:
            values -= groups.zeros.astype(np.float32)[:, of_column]
        values *= groups.scales[:, of_column]
        return to_float_format(values, self.format)


def _in_order(depth: int, group_size: int) -> NDArray[np.int32]:
    """The group of each column where groups are of neighbouring ones."""
    return np.arange(depth, dtype=np.int32) // np.int32(group_size)


def unpack_bits(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` of the numbers of 2, 4 or 8 bits that are packed along the last dimension of 32-bit
    words, the lowest bits first.

    >>> unpack_bits(np.asarray([[0x76543210]], np.int32), 4, 8).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits < 8:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        packed = (packed[..., None] >> shifts & np.uint8(2**bits - 1)).reshape(*words.shape[:-1], -1)
    return packed[..., :count]


def to_signed(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Numbers from 0 on as numbers from -2^(bits - 1) on."""
    return (numbers - np.uint8(2 ** (bits - 1))).view(np.int8)
