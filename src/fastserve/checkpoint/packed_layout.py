"""How a weight is laid out in the sidecar: the smallest storage is found by counting, then parts are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.bit_stream import pack_pieces, stream_bytes
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.packed_lines import (
    GAP_BITS,
    STRIP_ROWS,
    PackedStorage,
    find_entries,
    line_gaps,
    num_strips,
)
from fastserve.checkpoint.rounding import row_pieces
from fastserve.types import BoolArray, UInt8Array

# Elements that a byte of the file may stand for: what is sparser still is kept behind a bitmask, so that no
# small file asks for more memory than a machine has.
MOST_EXPANSION = 4096
_LEAST_ZEROS_OF_LINES = 0.5  # below, a bitmask is smaller than distances of any bits


@dataclass(frozen=True, slots=True)
class Layout:
    """All that must be known of a weight before its bytes are.

    Attributes:
        num_zeros: elements that stand for zero.
        num_codes: that are stored, those that only bridge distances included.
        gap_bits: of distances; 0: there are none.
    """

    storage: PackedStorage
    shape: tuple[int, int]
    bits: int
    num_zeros: int
    num_codes: int
    gap_bits: int = 0

    @property
    def num_lines(self) -> int:
        """Of which entries are counted."""
        rows, depth = self.shape
        return {"dense": 0, "bitmask": rows, "csr": rows, "csc": num_strips(rows) * depth}[self.storage]

    @property
    def counts_dtype(self) -> str:
        """As safetensors names it."""
        longest = STRIP_ROWS if self.storage == "csc" else self.shape[1]
        return "U16" if longest < 2**16 else "U32"

    def sizes(self) -> dict[str, int]:
        """Bytes of each part."""
        rows, depth = self.shape
        sizes = {"codes": stream_bytes(self.num_codes, self.bits)}
        if self.storage == "bitmask":
            sizes["mask"] = stream_bytes(rows * depth, 1)
        if self.num_lines:
            sizes["counts"] = self.num_lines * (2 if self.counts_dtype == "U16" else 4)
        if self.gap_bits:
            sizes["gaps"] = stream_bytes(self.num_codes, self.gap_bits)
        return sizes

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes().values())

    @property
    def expands_too_much(self) -> bool:
        return self.shape[0] * self.shape[1] > MOST_EXPANSION * self.num_bytes


def choose_layout(weight: GroupedTensor) -> Layout:
    """The smallest one."""
    rows, depth = weight.shape
    shape = (rows, depth)
    num_kept = sum(int(np.count_nonzero(piece.is_kept)) for piece in _pieces(weight, row_pieces(shape)))
    num_zeros = rows * depth - num_kept
    found = [
        Layout("dense", shape, weight.bits, num_zeros, rows * depth),
        Layout("bitmask", shape, weight.bits, num_zeros, num_kept),
    ]
    if num_zeros > _LEAST_ZEROS_OF_LINES * rows * depth:
        bridges: dict[PackedStorage, NDArray[np.int64]] = {
            "csr": np.zeros(len(GAP_BITS), np.int64),
            "csc": np.zeros(len(GAP_BITS), np.int64),
        }
        for piece in _pieces(weight, _strips(rows)):
            bridges["csr"] += _count_bridges(piece.is_kept)
            bridges["csc"] += _count_bridges(piece.is_kept.T)
        found += [
            Layout(storage, shape, weight.bits, num_zeros, num_kept + int(count), gap_bits)
            for storage, counts in bridges.items()
            for gap_bits, count in zip(GAP_BITS, counts, strict=True)
        ]
    return min(
        (layout for layout in found if not layout.expands_too_much), key=lambda layout: layout.num_bytes
    )


def encode(weight: GroupedTensor, layout: Layout) -> dict[str, NDArray[Any]]:
    """The parts of a weight, by name, as `Layout.sizes` counts them."""
    codes: list[UInt8Array] = []
    masks: list[BoolArray] = []
    gaps: list[UInt8Array] = []
    counts: list[NDArray[np.int64]] = []
    is_csc = layout.storage == "csc"
    for piece in _pieces(weight, _strips(weight.shape[0]) if is_csc else row_pieces(weight.shape)):
        if layout.storage == "dense":
            codes.append(piece.codes)
        elif layout.storage == "bitmask":
            masks.append(piece.is_kept)
            codes.append(piece.codes[piece.is_kept])
            counts.append(piece.is_kept.sum(axis=1))
        else:
            lines = _Piece(piece.codes.T, piece.is_kept.T) if is_csc else piece
            entries = find_entries(lines.is_kept, layout.gap_bits)
            codes.append(lines.codes.reshape(-1)[entries.places])
            gaps.append(entries.gaps)
            counts.append(entries.counts)
    parts: dict[str, NDArray[Any]] = {"codes": _join(pack_pieces(codes, layout.bits))}
    if masks:
        parts["mask"] = _join(pack_pieces(masks, 1))
    if counts:
        parts["counts"] = np.concatenate(counts).astype("<u2" if layout.counts_dtype == "U16" else "<u4")
    if gaps:
        parts["gaps"] = _join(pack_pieces(gaps, layout.gap_bits))
    assert {name: part.nbytes for name, part in parts.items()} == layout.sizes(), weight.name
    return parts


class _Piece(NamedTuple):
    """Some rows of a weight."""

    codes: UInt8Array  # from 0 on
    is_kept: BoolArray  # what does not stand for zero


def _pieces(weight: GroupedTensor, ranges: list[tuple[int, int]]) -> Iterator[_Piece]:
    lowest = 2 ** (weight.bits - 1)
    of_column = weight.column_groups()
    for begin, end in ranges:
        groups = weight.groups(begin, end)
        codes = groups.codes
        assert -lowest <= codes.min(initial=0) <= codes.max(initial=0) < lowest, weight.name
        is_kept = codes != (0 if groups.zeros is None else groups.zeros[:, of_column])
        yield _Piece(codes.view(np.uint8) + np.uint8(lowest), is_kept)


def _strips(rows: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + STRIP_ROWS, rows)) for begin in range(0, rows, STRIP_ROWS)]


def _count_bridges(is_kept: BoolArray) -> NDArray[np.int64]:
    """The entries that only bridge distances, for each number of bits that these may have."""
    gaps, _ = line_gaps(is_kept)
    return np.array([(gaps >> bits).sum() for bits in GAP_BITS], np.int64)


def _join(streams: Iterator[UInt8Array]) -> UInt8Array:
    return np.concatenate(list(streams))
