from __future__ import annotations

import pytest

from fastserve.evaluate.estimate import estimate_median, estimate_ratio


def test_a_median_of_equal_values_is_certain() -> None:
    estimate = estimate_median([3.0] * 7)
    assert (estimate.median, estimate.low, estimate.high, estimate.num_samples) == (3.0, 3.0, 3.0, 7)


def test_the_interval_of_three_values_is_their_range() -> None:
    # A resampled median is the least value with probability 7/27, far above 2.5 %; so is the greatest.
    estimate = estimate_median([5.0, 1.0, 2.0])
    assert (estimate.median, estimate.low, estimate.high) == (2.0, 1.0, 5.0)


def test_the_interval_leaves_out_one_outlier_among_many() -> None:
    # A resampled median of nine is the outlier only where five draws or more are it: probability 0.0012.
    estimate = estimate_median([1.0] * 8 + [100.0])
    assert (estimate.median, estimate.high) == (1.0, 1.0)


def test_ratios_are_taken_within_pairs() -> None:
    # The ratio of medians would be 20 / 10; the second pair ran on a busy machine.
    estimate = estimate_ratio([30.0, 6.0, 20.0], [10.0, 3.0, 20.0])
    assert estimate.median == 2.0
    assert (estimate.low, estimate.high) == (1.0, 3.0)


def test_values_without_a_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        estimate_ratio([1.0, 2.0], [1.0])
