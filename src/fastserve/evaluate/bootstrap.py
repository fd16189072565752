"""How sure a figure is that was measured on some rows: paired bootstrap over rows (Efron and Tibshirani 1993,
chapter 13: percentile intervals)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure on all rows, and the 95 % interval of its resamples.

    `share_above` is the share of resamples in which it is above 0: of a difference, how often the first is
    the better one.
    """

    value: float
    low: float
    high: float
    share_above: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high, "share_above": self.share_above}


def bootstrap(
    measure: Callable[[NDArray[np.int64]], dict[str, float]], num_rows: int, *, resamples: int, seed: int
) -> dict[str, Interval]:
    """Intervals of all figures that `measure` gives for chosen rows, drawn with replacement.

    >>> values = np.arange(100.0)
    >>> bootstrap(lambda rows: {"mean": values[rows].mean()}, 100, resamples=200, seed=0)["mean"].value
    49.5
    """
    rng = np.random.default_rng(seed)
    whole = measure(np.arange(num_rows))
    drawn = [measure(rng.integers(0, num_rows, num_rows)) for _ in range(resamples)]
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    intervals = {}
    for name, value in whole.items():
        values = np.array([figures[name] for figures in drawn if name in figures])
        low, high = np.quantile(values, tails)
        intervals[name] = Interval(float(value), float(low), float(high), float((values > 0).mean()))
    return intervals
