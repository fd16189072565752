"""Correlation of predicted and given numbers: Pearson's, and Spearman's of their ranks."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray


def pearson(x: Seq[float], y: Seq[float]) -> float:
    """Pearson's correlation; 0 where one of both never changes.

    >>> round(pearson([1, 2, 3], [2, 4, 7]), 4)
    0.9934
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0


def spearman(x: Seq[float], y: Seq[float]) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of theirs.

    >>> spearman([1, 20, 300], [5, 6, 7])
    1.0
    """
    return round(pearson(_ranks(x).tolist(), _ranks(y).tolist()), 12)


def _ranks(values: Seq[float]) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks
