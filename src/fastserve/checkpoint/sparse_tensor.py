"""Rows of a matrix whose values other than zero are stored row by row, behind a mask of bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.tensor import TensorFormat
from fastserve.errors import CheckpointError

_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class BitmaskRows:
    """Makes rows dense again, some at a time."""

    where: str  # for messages
    shape: tuple[int, int]
    format: TensorFormat | None  # of the values; None: int8
    values: NDArray[np.uint8]  # their bytes
    bitmask: NDArray[np.uint8]  # [rows, columns / 8], the lowest bit first

    @property
    def _element_bytes(self) -> int:
        return 1 if self.format is None else self.format.block_bytes

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Of each row's values, and behind the last [rows + 1].

        Raises:
            CheckpointError: there are more or fewer values than bits.
        """
        rows = self.shape[0]
        counts = [
            self._mask(at, min(at + _ROWS_AT_A_TIME, rows)).sum(axis=1)
            for at in range(0, rows, _ROWS_AT_A_TIME)
        ]
        starts = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
        num_values = len(self.values) // self._element_bytes
        if starts[-1] != num_values:
            raise CheckpointError(
                f"{self.where} has {num_values} values, {starts[-1]} bits are set in its bitmask",
                hint="download the model again",
            )
        return starts

    def read(self, begin: int, end: int) -> NDArray[np.uint8]:
        """The bytes of dense rows `begin` up to `end`."""
        size = self._element_bytes
        mask = self._mask(begin, end)
        dense = np.zeros((*mask.shape, size), np.uint8)
        first, last = self._starts[begin], self._starts[end]
        dense[mask.astype(bool)] = self.values[first * size : last * size].reshape(-1, size)
        return dense.reshape(-1)

    def _mask(self, begin: int, end: int) -> NDArray[np.uint8]:
        return np.unpackbits(self.bitmask[begin:end], axis=1, count=self.shape[1], bitorder="little")
