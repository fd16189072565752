"""Texts that are almost equal: the Jaccard similarity of their shingles, estimated by MinHash and found by
locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3).

A shingle is five characters, so that no language needs words. Texts count without case, digits as one digit,
and space as one space.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

NUM_HASHES = 128
_SHINGLE_CHARACTERS = 5
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # 2^64 by the golden ratio, odd: Knuth's multiplicative hashing

_Array = np.ndarray[Any, Any]


def shingles(text: str) -> _Array:
    """Hashes of a text's different shingles, uint64, sorted. A text shorter than one has itself."""
    folded = " ".join(text.casefold().split())
    codes = np.frombuffer(folded.encode("utf-32-le", errors="surrogatepass"), np.uint32).astype(np.uint64)
    num = max(len(codes) - _SHINGLE_CHARACTERS + 1, 1)
    hashes = np.zeros(num, np.uint64)
    for index in range(min(_SHINGLE_CHARACTERS, len(codes))):
        hashes = (hashes ^ codes[index : index + num]) * _PRIME
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def similarity(one: _Array, other: _Array) -> float:
    """Jaccard similarity of two sets of shingles.

    >>> similarity(shingles("good morning"), shingles("Good  morning"))
    1.0
    """
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def signature(hashes: _Array) -> _Array:
    """The least of each of 128 hash functions over a set of shingles: uint32 [128]. Two agree in each place
    with the probability that is their similarity."""
    factors, terms = _functions()
    halves = (hashes >> np.uint64(32)).astype(np.uint32)  # of 32 bits: eight times as fast as of 64
    minima = np.full(NUM_HASHES, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(halves), 512):  # a long text's table of hashes would be large
        table = factors * halves[start : start + 512]  # [128, shingles]
        table += terms
        np.minimum(minima, table.min(axis=1), out=minima)
    return minima


def band_keys(signed: _Array, num_bands: int) -> _Array:
    """A key for each band of a signature, uint64 [bands]: similar texts share one, most likely."""
    rows = NUM_HASHES // num_bands
    keys = np.arange(1, num_bands + 1, dtype=np.uint64) * _PRIME
    for index in range(rows):
        keys = (keys ^ signed[index : rows * num_bands : rows].astype(np.uint64)) * _PRIME
        keys ^= keys >> np.uint64(31)
    return keys


@lru_cache
def choose_bands(threshold: float) -> int:
    """How many bands find texts as similar as `threshold` with a probability of 0.95 or more: as few as do.

    Texts of similarity s share one of b bands of r rows with probability 1 - (1 - s^r)^b.
    """
    for num_bands in (1, 2, 4, 8, 16, 32, 64, 128):
        rows = NUM_HASHES // num_bands
        if 1 - (1 - threshold**rows) ** num_bands >= 0.95:
            return num_bands
    return NUM_HASHES


@lru_cache
def _functions() -> tuple[_Array, _Array]:
    """Odd factors and terms of multiply-add hashing, [128, 1], drawn once and for all."""
    drawn = np.random.default_rng(0).integers(0, 2**32, (2, NUM_HASHES, 1), dtype=np.uint32)
    return drawn[0] | np.uint32(1), drawn[1]
