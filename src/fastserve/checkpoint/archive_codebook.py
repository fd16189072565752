"""One codebook for all floats of a matrix: k-means in one dimension, on a histogram (Han et al., Deep
Compression, arXiv 1510.00149, section 3). What is zero stays zero: it has an entry of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastserve.checkpoint.convert import from_bf16, to_bf16
from fastserve.types import Float32Array, Float64Array, Int64Array, UInt8Array

_MOST_ROUNDS = 200
_BINS_OF_START = 4096


@dataclass(frozen=True, slots=True)
class Codebook:
    """Entries in ascending order; a number becomes the nearest, and zero is one of them where it occurs."""

    entries: Float32Array

    def indices(self, values: Float32Array) -> UInt8Array:
        """The entry of each number, which are taken as bfloat16 has them."""
        middles = (self.entries[1:].astype(np.float64) + self.entries[:-1]) / 2
        found = np.searchsorted(middles, values)
        (at_zero,) = np.nonzero(self.entries == 0)
        if at_zero.size:  # and what is not zero never becomes it
            zero = int(at_zero[0])
            is_lost = (found == zero) & (values != 0)
            found[is_lost & (values < 0)] = max(zero - 1, 0)
            found[is_lost & (values > 0)] = min(zero + 1, len(self.entries) - 1)
        return found.astype(np.uint8)


def make_codebook(pieces: Iterable[Float32Array], num_entries: int) -> Codebook:
    """The codebook of a matrix that comes in pieces. The same numbers give the same codebook."""
    counts = np.zeros(2**16, np.int64)
    for piece in pieces:
        counts += np.bincount(to_bf16(piece.reshape(-1)), minlength=2**16)
    (patterns,) = np.nonzero(counts)
    values = from_bf16(patterns.astype(np.uint16)).astype(np.float64)
    order = np.argsort(values, kind="stable")
    values, weights = values[order], counts[patterns[order]]
    is_zero = values == 0
    has_zero = bool(is_zero.any())
    centers = k_means(values[~is_zero], weights[~is_zero], num_entries - has_zero)
    entries = np.sort(np.concatenate([centers, [0.0]] if has_zero else [centers]))
    return Codebook(entries.astype(np.float32))


def k_means(values: Float64Array, weights: Int64Array, num_centers: int) -> Float64Array:
    """Centers of ascending values that occur `weights` times each: Lloyd's iteration until nothing moves.

    It starts where the asymptotically best quantizer has its entries, with a density of the cube root of that
    of the values (Panter and Dite, Proc. IRE 39, 1951); nothing is random.

    >>> k_means(np.array([0.0, 1.0, 9.0, 10.0]), np.array([1, 1, 1, 1]), 2).tolist()
    [0.5, 9.5]
    """
    if len(values) <= num_centers:
        return values
    total = np.concatenate([[0], np.cumsum(weights)]).astype(np.float64)
    moments = np.concatenate([[0.0], np.cumsum(values * weights)])
    centers = _start(values, weights, num_centers)
    ends = np.zeros(0, np.int64)
    for _ in range(_MOST_ROUNDS):
        new_ends = np.searchsorted(values, (centers[1:] + centers[:-1]) / 2)
        if np.array_equal(new_ends, ends):
            break
        ends = new_ends
        bounds = np.concatenate([[0], ends, [len(values)]])
        count = np.diff(total[bounds])
        means = np.divide(np.diff(moments[bounds]), count, out=centers.copy(), where=count > 0)
        centers = np.sort(means)
    return centers


def _start(values: Float64Array, weights: Int64Array, num_centers: int) -> Float64Array:
    density, edges = np.histogram(values, bins=_BINS_OF_START, weights=weights)
    share = np.cumsum(np.cbrt(density.astype(np.float64)))
    wanted = (np.arange(num_centers) + 0.5) / num_centers * share[-1]
    at = np.searchsorted(share, wanted)
    return np.unique(edges[at] + (edges[1] - edges[0]) * 0.5)
