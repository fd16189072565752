"""Probabilities of an ensemble's members become one: against numpy written out."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve.engine.mix import Mix, average, stack, vote
from fastserve.errors import CheckpointError
from fastserve.models.ensemble import EnsembleSettings, read_ensemble


def random_shares(*shape: int) -> np.ndarray:
    shares = np.random.default_rng(7).random(shape)
    return shares / shares.sum(axis=-1, keepdims=True)


def test_an_average_is_the_weighted_mean_over_members() -> None:
    shares = random_shares(3, 5, 4)
    assert np.array_equal(average(shares, (1, 1, 1)), np.average(shares, axis=0, weights=[1, 1, 1]))
    expected = (2 * shares[0] + shares[1] + shares[2]) / 4
    assert average(shares, (2, 1, 1)) == pytest.approx(expected, abs=1e-15)


def test_most_votes_win_and_the_mean_decides_between_equals() -> None:
    shares = np.array([[0.4, 0.35, 0.25], [0.1, 0.8, 0.1], [0.45, 0.3, 0.25]])
    assert vote(shares, (1, 1, 1), is_exclusive=True) == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-5)
    assert vote(shares, (1, 3, 1), is_exclusive=True).argmax() == 1
    two = vote(shares[:2], (1, 1), is_exclusive=True)
    assert two == pytest.approx([0.5, 0.5, 0], abs=1e-5)
    assert two.argmax() == 1  # whose mean is higher
    assert two.sum() == pytest.approx(1)


def test_of_labels_that_may_be_several_each_is_voted_on_by_itself() -> None:
    shares = np.array([[0.9, 0.6], [0.8, 0.1], [0.2, 0.3]])
    assert vote(shares, (1, 1, 1), is_exclusive=False) == pytest.approx([2 / 3, 1 / 3], abs=1e-5)


def test_stacking_is_a_regression_on_the_probabilities_of_all_members() -> None:
    shares = random_shares(2, 5, 3)
    coefficients, intercepts = np.random.default_rng(1).normal(size=(3, 6)), [0.1, -0.2, 0.3]
    found = stack(shares, coefficients, intercepts, is_exclusive=True)
    for row in range(5):
        logits = coefficients @ np.concatenate([shares[0, row], shares[1, row]]) + intercepts
        assert found[row] == pytest.approx(np.exp(logits) / np.exp(logits).sum())


def test_members_may_have_the_labels_in_other_orders() -> None:
    settings = EnsembleSettings(method="average", members=("a", "b"), weights=(1.0, 1.0))
    mix = Mix(settings, [(0, 1), (1, 0)], is_exclusive=True)
    assert mix([np.array([0.9, 0.1]), np.array([0.3, 0.7])]).tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "boost"}, "a method that we know"),
        ({"members": ["a"]}, "two or more folders"),
        ({"members": ["a", "../b"]}, "two or more folders"),
        ({"weights": [1.0]}, "1 x 2 numbers"),
        ({"weights": [1.0, float("nan")]}, "1 x 2 numbers"),
        ({"weights": [1.0, -1.0]}, "none may be negative"),
        ({"method": "stacking", "coefficients": [[1.0] * 5] * 3, "intercepts": [0.0] * 3}, "3 x 6 numbers"),
    ],
)
def test_what_an_ensemble_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    right = EnsembleSettings(method="vote", members=("a", "b"), weights=(1.0, 2.0))
    assert read_ensemble({"ensemble": right.to_json()}, num_labels=3) == right
    assert read_ensemble({"task": "text-classification"}, num_labels=3) is None
    with pytest.raises(CheckpointError, match=message):
        read_ensemble({"ensemble": {**right.to_json(), **change}}, num_labels=3)
