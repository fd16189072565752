"""Bytes of tensors as planes of symbols, each plane through an entropy coder with its own distribution.

A plane is what has one distribution: the exponents of floats, or their mantissas; bytes; or the numbers of a
few bits that bytes are made of (`bit_stream.py`). The coder is the ANS coder of `constriction`
(Bamler, arXiv 2201.01741), which comes within a thousandth of the entropy of the counts that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastserve.checkpoint.bit_stream import pack_stream, unpack_stream
from fastserve.errors import UnsupportedError
from fastserve.types import Int64Array, UInt8Array

PIECE_BYTES = 840 * 4096  # 840 holds whole blocks of numbers of one to eight bits
_SAMPLE_BYTES = 840 * 1024
_WIDTHS = (8, 4, 3, 5, 6, 7)  # bits of symbols that a stream of bytes may be made of
_LARGEST_COUNT = 2**16 - 1
_LEAST_GAIN = 0.01  # else bytes are kept as they are
_LEAST_BYTES = 512  # of a plane whose counts are worth their room
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_NUMBER_BYTES = {**_FLOAT_BYTES, "U16": 2, "I16": 2, "U32": 4, "U64": 8, "I64": 8}  # I32: packed codes


def import_coder() -> Any:
    """`constriction`.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import constriction
    except ImportError as error:
        raise UnsupportedError(
            f"archives need constriction: {error}", hint="pip install 'fastserve-llm[compress]'"
        ) from error
    return constriction


@dataclass(frozen=True, slots=True)
class Plane:
    """How a plane is coded.

    Attributes:
        width: bits of a symbol.
        counts: of each symbol, scaled to 16 bits; empty where the symbols, bytes, are kept as they are.
        lengths: bytes of each coded piece.
    """

    width: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...] = ()


def num_planes(dtype: str) -> int:
    return _NUMBER_BYTES.get(dtype, 1)


def split(data: UInt8Array, dtype: str) -> list[UInt8Array]:
    """The planes of a tensor's bytes: of numbers, one for each of their bytes, the highest last. Floats are
    rotated by a bit first, so that one plane has the exponent, or its highest bits, without the sign."""
    size = num_planes(dtype)
    if size == 1:
        return [data]
    words = np.frombuffer(data.tobytes(), f"<u{size}")
    if dtype in _FLOAT_BYTES:
        words = words << words.dtype.type(1) | words >> words.dtype.type(8 * size - 1)
    numbers = words.view(np.uint8).reshape(-1, size)
    return [np.ascontiguousarray(numbers[:, place]) for place in range(size)]


def join(planes: list[UInt8Array], dtype: str) -> UInt8Array:
    """The bytes that `split` took apart."""
    size = num_planes(dtype)
    if size == 1:
        return planes[0]
    words = np.stack(planes, axis=1).reshape(-1).view(f"<u{size}")
    if dtype in _FLOAT_BYTES:
        words = words >> words.dtype.type(1) | words << words.dtype.type(8 * size - 1)
    return words.view(np.uint8)


def pieces_of(data: UInt8Array) -> Iterator[UInt8Array]:
    for begin in range(0, len(data), PIECE_BYTES):
        yield data[begin : begin + PIECE_BYTES]


def piece_sizes(num_bytes: int) -> list[int]:
    """Of a tensor of so many bytes."""
    return [min(PIECE_BYTES, num_bytes - begin) for begin in range(0, num_bytes, PIECE_BYTES)]


def plan_plane(pieces: Callable[[], Iterable[UInt8Array]], *, is_stream: bool) -> tuple[Plane, float]:
    """How a plane of bytes is coded, and the entropy of its symbols in bits. `is_stream` where its bytes may
    be made of narrower numbers: the width is taken that codes a sample of them best.
    """
    width = _best_width(pieces) if is_stream else 8
    counts = np.zeros(2**width, np.int64)
    num_bytes = 0
    for piece in pieces():
        counts += np.bincount(to_symbols(piece, width), minlength=2**width)
        num_bytes += len(piece)
    bits = entropy_bits(counts)
    scaled = _scale(counts)
    coded_bytes = bits / 8 + 2 * np.count_nonzero(scaled)
    if num_bytes < _LEAST_BYTES or coded_bytes > (1 - _LEAST_GAIN) * num_bytes:
        return Plane(8, ()), bits
    return Plane(width, scaled), bits


def to_symbols(data: UInt8Array, width: int) -> UInt8Array:
    """The numbers of `width` bits that bytes are made of."""
    return data if width == 8 else unpack_stream(data, 0, len(data) * 8 // width, width)


def entropy_bits(counts: Int64Array) -> float:
    """Of so many symbols, in all: the least that a code of order zero takes (Shannon 1948, theorem 9).

    >>> entropy_bits(np.array([2, 2, 0]))
    4.0
    """
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) if counts.size > 1 else 0.0


class Coder:
    """Codes and decodes pieces of one plane."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._constriction = import_coder()
        counts = np.array(plane.counts, np.float64)
        self._only = int(counts.argmax()) if np.count_nonzero(counts) == 1 else None
        if self._only is None and plane.counts:
            self._model = self._constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)

    def encode(self, data: UInt8Array) -> UInt8Array:
        """The coded bytes of a piece."""
        if not self._plane.counts:
            return data
        if self._only is not None:
            return np.zeros(0, np.uint8)
        coder = self._constriction.stream.stack.AnsCoder()
        coder.encode_reverse(to_symbols(data, self._plane.width).astype(np.int32), self._model)
        words: UInt8Array = coder.get_compressed().astype("<u4").view(np.uint8)
        return words

    def decode(self, coded: UInt8Array, num_bytes: int) -> UInt8Array:
        """A piece of so many bytes.

        Raises:
            ValueError: nothing that was coded is so.
        """
        if not self._plane.counts:
            if len(coded) != num_bytes:
                raise ValueError(f"{len(coded)} bytes are kept of {num_bytes}")
            return coded
        count = num_bytes * 8 // self._plane.width
        if self._only is not None:
            return pack_stream(np.full(count, self._only, np.uint8), self._plane.width)[:num_bytes]
        words = np.frombuffer(coded.tobytes(), "<u4").astype(np.uint32)
        decoder = self._constriction.stream.stack.AnsCoder(words)
        return pack_stream(decoder.decode(self._model, count).astype(np.uint8), self._plane.width)[:num_bytes]


def _best_width(pieces: Callable[[], Iterable[UInt8Array]]) -> int:
    all_pieces = list(pieces())
    num_bytes = sum(map(len, all_pieces))
    sample = all_pieces[len(all_pieces) // 2][:_SAMPLE_BYTES] if all_pieces else np.zeros(0, np.uint8)

    def cost(width: int) -> float:
        counts = np.bincount(to_symbols(sample, width), minlength=2**width)
        table_bits = 16 * np.count_nonzero(counts) * len(sample) / max(num_bytes, 1)
        return entropy_bits(counts) + float(table_bits)

    fitting = [width for width in _WIDTHS if num_bytes % width == 0 or width in (4, 8)]
    return min(fitting, key=cost)


def _scale(counts: Int64Array) -> tuple[int, ...]:
    """Counts of 16 bits; none that is not zero becomes zero."""
    factor = _LARGEST_COUNT / max(int(counts.max(initial=0)), 1)
    scaled = np.where(counts > 0, np.maximum(np.rint(counts * min(factor, 1.0)), 1), 0)
    return tuple(int(count) for count in scaled)
