"""Codes of a matrix without those that stand for zero: behind a bitmask, or line by line with distances.

A line is a row (CSR), or a column of a strip of rows (CSC: strips, so that some rows can be read without the
others). An entry is a code and the number of elements that its line skips before it. Longer distances than
the stored bits hold have entries in between whose codes stand for zero, as in Han et al., arXiv 1510.00149,
section 2: a reader need not tell them from others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.bit_stream import stream_bytes, unpack_stream
from fastserve.errors import CheckpointError

PackedStorage = Literal["dense", "bitmask", "csr", "csc"]

STRIP_ROWS = 512  # of CSC
GAP_BITS = range(1, 9)


class Entries(NamedTuple):
    """Of consecutive lines."""

    counts: NDArray[np.int64]  # of entries [lines]
    gaps: NDArray[np.uint8]  # elements that are skipped before each
    places: NDArray[np.int64]  # of each among the elements of all these lines


def find_entries(is_kept: NDArray[np.bool_], gap_bits: int) -> Entries:
    """The entries of lines [lines, length] that keep these elements."""
    gaps, lines = line_gaps(is_kept)
    num_between = gaps >> gap_bits  # entries that only bridge
    ends = np.cumsum(num_between + 1)
    all_gaps = np.full(ends[-1] if len(ends) else 0, 2**gap_bits - 1, np.uint8)
    all_gaps[ends - 1] = gaps - (num_between << gap_bits)
    counts = np.bincount(lines, weights=num_between + 1, minlength=len(is_kept)).astype(np.int64)
    places = _places(all_gaps, counts) + np.repeat(np.arange(len(counts)), counts) * is_kept.shape[1]
    return Entries(counts, all_gaps, places)


def line_gaps(is_kept: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many elements lines [lines, length] skip before each that is kept; and the line of each."""
    lines, places = np.nonzero(is_kept)
    gaps = np.diff(places, prepend=-1) - 1
    is_first = np.diff(lines, prepend=-1) != 0
    gaps[is_first] = places[is_first]
    return gaps, lines


def _places(gaps: NDArray[np.uint8], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in its line each entry is."""
    ends = np.cumsum(gaps.astype(np.int64) + 1)
    before = np.concatenate([[0], ends])[np.cumsum(counts) - counts]
    places: NDArray[np.int64] = ends - 1 - np.repeat(before, counts)
    return places


def num_strips(rows: int) -> int:
    """That CSC keeps apart."""
    return -(-rows // STRIP_ROWS)


@dataclass(frozen=True)
class StoredCodes:
    """Codes [rows, columns] of `bits` bits, from 0 on, some rows at a time.

    Attributes:
        where: for messages.
        codes: a stream of all codes, or of those of entries.
        mask: of a bitmask: a stream of bits, row by row.
        counts: of entries, of each line; those of a bitmask's row.
        gaps: of entries: a stream.
    """

    where: str
    storage: PackedStorage
    shape: tuple[int, int]
    bits: int
    codes: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None = None
    counts: NDArray[np.unsignedinteger] | None = None
    gaps: NDArray[np.uint8] | None = None
    gap_bits: int = 0

    def read(self, begin: int, end: int, left_out: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Rows `begin` up to `end`, what is left out being as in a fresh array that `left_out` gives.

        Raises:
            CheckpointError: parts contradict each other.
        """
        depth = self.shape[1]
        if self.storage == "dense":
            return unpack_stream(self.codes, begin * depth, (end - begin) * depth, self.bits).reshape(
                -1, depth
            )
        out = left_out()
        if self.storage == "bitmask":
            self._fill_masked(begin, end, out)
        elif self.storage == "csr":
            self._fill_lines(begin, out)
        else:
            self._fill_strips(begin, end, out)
        return out

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Of each line's entries, and behind the last [lines + 1].

        Raises:
            CheckpointError: they are not as many as there are codes or gaps.
        """
        assert self.counts is not None
        starts = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        total = int(starts[-1])
        sizes = [(self.codes, self.bits)] + ([] if self.gaps is None else [(self.gaps, self.gap_bits)])
        if any(len(stream) != stream_bytes(total, bits) for stream, bits in sizes):
            raise self._contradict(f"{total} entries are counted, which {len(self.codes)} bytes do not hold")
        return starts

    def _fill_masked(self, begin: int, end: int, out: NDArray[np.uint8]) -> None:
        assert self.mask is not None
        depth = self.shape[1]
        first, last = int(self.starts[begin]), int(self.starts[end])
        is_kept = unpack_stream(self.mask, begin * depth, (end - begin) * depth, 1).astype(bool)
        if (num_kept := int(np.count_nonzero(is_kept))) != last - first:
            raise self._contradict(f"{last - first} codes are counted, {num_kept} bits are set in the mask")
        out[is_kept.reshape(out.shape)] = unpack_stream(self.codes, first, last - first, self.bits)

    def _fill_strips(self, begin: int, end: int, out: NDArray[np.uint8]) -> None:
        for index in range(begin // STRIP_ROWS, -(-end // STRIP_ROWS)):
            start = index * STRIP_ROWS
            stop = min(start + STRIP_ROWS, self.shape[0])
            low, high = max(start, begin), min(stop, end)
            strip = np.zeros((self.shape[1], stop - start), np.uint8)
            strip[:, low - start : high - start] = out[low - begin : high - begin].T
            self._fill_lines(index * self.shape[1], strip)
            out[low - begin : high - begin] = strip[:, low - start : high - start].T

    def _fill_lines(self, line: int, out: NDArray[np.uint8]) -> None:
        """Lines from `line` on, as many as `out` [lines, length] has."""
        assert self.gaps is not None
        num_lines, length = out.shape
        starts = self.starts[line : line + num_lines + 1]
        first, count = int(starts[0]), int(starts[-1] - starts[0])
        places = _places(unpack_stream(self.gaps, first, count, self.gap_bits), np.diff(starts))
        if places.size and int(places.max()) >= length:
            raise self._contradict(f"an entry is at {int(places.max())} of a line of {length} elements")
        lines = np.repeat(np.arange(num_lines), np.diff(starts))
        out[lines, places] = unpack_stream(self.codes, first, count, self.bits)

    def _contradict(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}", hint="write or download the model again")
