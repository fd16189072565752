"""Checks the compiled normalization rules of SentencePiece, which the `tokenizers` library follows blindly.

The rules are a double-array trie from texts to places in a list of replacements: `u32 trie_bytes`, the
trie's units of 4 bytes, then replacements in UTF-8, each ended by a NUL. Source: DecodePrecompiledCharsMap of
google/sentencepiece src/normalizer.cc; units as in include/darts.h of s-yata/darts-clone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_REPLACEMENT_BYTES = 256  # Unicode's longest (U+FDFA) is 33

_LEAF = np.uint32(1 << 31)
_VALUE_BITS = np.uint32(0x7FFF_FFFF)
_WIDE_OFFSET = np.uint32(1 << 9)  # the offset then counts in 256
_OFFSET_SHIFT = np.uint32(10)
_LABEL_BITS = np.uint32(0xFF)
_HAS_VALUE = np.uint32(1 << 8)


def check_charsmap(charsmap: bytes) -> None:
    """Raise ValueError unless every path through the trie stays in it and ends at a short replacement."""
    if not charsmap:
        return
    trie_bytes = int.from_bytes(charsmap[:4], "little")
    replacements = charsmap[4 + trie_bytes :]
    if len(charsmap) < 4 or trie_bytes % 4 or not trie_bytes or not replacements:
        raise ValueError(f"its normalization rules of {len(charsmap)} bytes have a trie of {trie_bytes}")
    if replacements[-1] != 0:
        raise ValueError("its last normalization rule has no end")
    replacements.decode("utf-8")
    longest = max(map(len, replacements.split(b"\0")))
    if longest > MAX_REPLACEMENT_BYTES:
        raise ValueError(f"a normalization rule writes {longest} bytes, the limit is {MAX_REPLACEMENT_BYTES}")
    units = np.frombuffer(charsmap, np.uint32, count=trie_bytes // 4, offset=4)
    is_value = (units & _LEAF) != 0
    _check_values(units[is_value], replacements)
    # No byte leads to a unit that is marked as a value; the root is read in any case.
    inner = np.flatnonzero(~is_value)
    inner = inner if inner.size and inner[0] == 0 else np.insert(inner, 0, 0)
    steps = units[inner]
    offsets = (steps >> _OFFSET_SHIFT) << ((steps & _WIDE_OFFSET) >> np.uint32(6))
    targets = inner.astype(np.uint32) ^ offsets
    farthest = int((targets | _LABEL_BITS).max())
    if farthest >= len(units):
        raise ValueError(f"its normalization rules lead to unit {farthest} of {len(units)}")
    # Where a path ends a value is read, whatever the mark of that unit.
    _check_values(units[targets[(steps & _HAS_VALUE) != 0]], replacements)


def _check_values(units: NDArray[np.uint32], replacements: bytes) -> None:
    values = units & _VALUE_BITS
    if values.size and int(values.max()) >= len(replacements):
        raise ValueError(f"a normalization rule is at byte {int(values.max())} of {len(replacements)}")
    if np.any((np.frombuffer(replacements, np.uint8)[values] & 0xC0) == 0x80):
        raise ValueError("a normalization rule begins within a character")
