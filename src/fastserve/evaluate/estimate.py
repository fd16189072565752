"""Medians with their uncertainty: what a few noisy timings on one machine can say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median with the bounds between which 95 % of bootstrap medians lie."""

    median: float
    low: float
    high: float
    num_samples: int

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


def estimate_median(values: Sequence[float], *, num_resamples: int = 10_000) -> Estimate:
    """The median of independent values, with a percentile bootstrap interval (Efron, Ann. Statist. 7, 1979).

    >>> print(estimate_median([2.0, 2.0, 2.0]))
    2 [2, 2]
    """
    sample = np.asarray(values, dtype=np.float64)
    resamples = np.random.default_rng(0).choice(sample, size=(num_resamples, len(sample)))
    low, high = np.percentile(np.median(resamples, axis=1), [2.5, 97.5])
    return Estimate(float(np.median(sample)), float(low), float(high), len(sample))


def estimate_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The median of ours / theirs over runs made in pairs, so that what slows a pair slows both of it.

    >>> print(estimate_ratio([2.0, 30.0], [1.0, 15.0]))
    2 [2, 2]
    """
    return estimate_median([one / other for one, other in zip(ours, theirs, strict=True)])
