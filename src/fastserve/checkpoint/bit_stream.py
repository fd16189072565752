"""Numbers of one to eight bits, one behind the other without gaps: eight of them take as many whole bytes as
they have bits each, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 8  # numbers that end on a byte, whatever their bits


def stream_bytes(count: int, bits: int) -> int:
    """The bytes of so many numbers: the last block is filled with zeros.

    >>> stream_bytes(9, 3)
    6
    """
    return -(-count // _BLOCK) * bits


def pack_stream(numbers: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The bytes of numbers from 0 to 2^bits - 1, of any shape.

    >>> pack_stream(np.array([1, 2, 3], np.uint8), 4).tolist()
    [33, 3, 0, 0]
    """
    flat = np.ascontiguousarray(numbers, np.uint8).reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % _BLOCK)).reshape(-1, _BLOCK)
    if bits == 8:
        return blocks.reshape(-1)
    words = np.zeros(len(blocks), "<u8")
    for place in range(_BLOCK):
        words |= blocks[:, place].astype("<u8") << np.uint64(bits * place)
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(-1)


def pack_pieces(pieces: Iterable[NDArray[Any]], bits: int) -> Iterator[NDArray[np.uint8]]:
    """`pack_stream` of numbers that come in pieces of any length."""
    rest = np.zeros(0, np.uint8)
    for piece in pieces:
        rest = np.concatenate([rest, np.ascontiguousarray(piece, np.uint8).reshape(-1)])
        whole = len(rest) // _BLOCK * _BLOCK
        yield pack_stream(rest[:whole], bits)
        rest = rest[whole:]
    yield pack_stream(rest, bits)


def unpack_stream(packed: NDArray[np.uint8], first: int, count: int, bits: int) -> NDArray[np.uint8]:
    """`count` numbers from the `first` on: only their bytes are touched.

    >>> unpack_stream(np.array([33, 3, 0, 0], np.uint8), 1, 2, 4).tolist()
    [2, 3]
    """
    begin, end = first // _BLOCK, -(-(first + count) // _BLOCK)
    stored = packed[begin * bits : end * bits]
    if bits in (1, 2, 4):  # that no byte's end cuts
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        stored = (stored[:, None] >> shifts & np.uint8(2**bits - 1)).reshape(-1)
    elif bits < 8:
        words = np.zeros((end - begin, 8), np.uint8)
        words[:, :bits] = stored.reshape(-1, bits)
        places = np.arange(0, _BLOCK * bits, bits, dtype=np.uint64)
        stored = (words.view("<u8") >> places & np.uint64(2**bits - 1)).astype(np.uint8).reshape(-1)
    skipped = first - begin * _BLOCK
    return stored[skipped : skipped + count]
