"""Whether a classifier's probabilities are to be believed: reliability by bins, and the expected calibration
error (Guo et al. 2017, arXiv 1706.04599, section 2)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

NUM_BINS = 15  # as in the paper


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Predictions whose confidence lies in (low, high]: their number, mean confidence, and share that is
    right."""

    low: float
    high: float
    num_rows: int
    confidence: float
    accuracy: float


def reliability(
    confidences: Seq[float], is_right: Seq[bool], *, num_bins: int = NUM_BINS
) -> list[ReliabilityBin]:
    """Predictions by their confidence, in bins of equal width; a bin without any is left out."""
    values, right = np.asarray(confidences, np.float64), np.asarray(is_right, np.float64)
    index = np.clip(np.ceil(values * num_bins).astype(int) - 1, 0, num_bins - 1)
    bins = []
    for number in range(num_bins):
        chosen = index == number
        if chosen.any():
            low, high = number / num_bins, (number + 1) / num_bins
            mean, accuracy = float(values[chosen].mean()), float(right[chosen].mean())
            bins.append(ReliabilityBin(low, high, int(chosen.sum()), mean, accuracy))
    return bins


def calibration_error(bins: Seq[ReliabilityBin]) -> float:
    """The expected calibration error: how far confidence and accuracy lie apart, weighted by the rows of
    bins.

    >>> calibration_error([ReliabilityBin(0.8, 1.0, 4, 0.9, 0.75)])
    0.15
    """
    total = sum(bin_.num_rows for bin_ in bins)
    error = (
        sum(bin_.num_rows * abs(bin_.confidence - bin_.accuracy) for bin_ in bins) / total if total else 0.0
    )
    return round(error, 12)
