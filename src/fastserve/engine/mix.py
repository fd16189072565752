"""From the probabilities of an ensemble's members to those of the ensemble."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from fastserve.engine.probability import sigmoid, softmax
from fastserve.models.ensemble import EnsembleSettings
from fastserve.types import Float64Array

_TIE_BREAK = 1e-6  # of a vote: what the mean probability counts beside it, so that no two labels are equal


@dataclass(frozen=True, slots=True)
class Mix:
    """How members become one.

    Attributes:
        orders: of each member, by the ensemble's labels, the index of the label among its own.
        is_exclusive: see `are_exclusive`.
    """

    settings: EnsembleSettings
    orders: Seq[Seq[int]]
    is_exclusive: bool

    def __call__(self, members: Seq[Float64Array]) -> Float64Array:
        """Probabilities (numbers, of regression) [..., labels] of what each member says, [..., labels] in the
        order of its own labels."""
        shares = self.arrange(members)
        settings = self.settings
        if settings.method == "stacking":
            return stack(shares, settings.coefficients, settings.intercepts, is_exclusive=self.is_exclusive)
        if settings.method == "vote":
            return vote(shares, settings.weights, is_exclusive=self.is_exclusive)
        return average(shares, settings.weights)

    def arrange(self, members: Seq[Float64Array]) -> Float64Array:
        """What each says, [members, ..., labels], in the order of the ensemble's labels."""
        return np.stack(
            [values[..., list(order)] for values, order in zip(members, self.orders, strict=True)]
        )


def average(shares: Float64Array, weights: Seq[float]) -> Float64Array:
    """The weighted mean over members of [members, ..., labels].

    >>> average(np.array([[0.2, 0.8], [0.6, 0.4]]), (1, 1)).round(6).tolist()
    [0.4, 0.6]
    """
    return np.asarray(np.average(shares, axis=0, weights=weights))


def vote(shares: Float64Array, weights: Seq[float], *, is_exclusive: bool) -> Float64Array:
    """The share of members, by weight, that each label has: as their likeliest, or, where several may be
    right, with a probability of a half or more. The mean probability counts as a millionth of all votes: it
    decides between labels that have as many. [members, ..., labels] to [..., labels].

    >>> vote(np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]), (1, 1, 1), is_exclusive=True).round(3).tolist()
    [0.333, 0.667]
    """
    if is_exclusive:
        votes = (np.arange(shares.shape[-1]) == shares.argmax(axis=-1)[..., None]).astype(np.float64)
    else:
        votes = (shares >= 0.5).astype(np.float64)
    return (average(votes, weights) + _TIE_BREAK * average(shares, weights)) / (1 + _TIE_BREAK)


def stack(
    shares: Float64Array,
    coefficients: Seq[Seq[float]],
    intercepts: Seq[float],
    *,
    is_exclusive: bool,
) -> Float64Array:
    """What a logistic regression on the probabilities of all members says (Wolpert 1992, "Stacked
    generalization"): [members, ..., labels] to [..., labels]."""
    features = features_of(shares)
    logits = features @ np.asarray(coefficients).T + np.asarray(intercepts)
    return softmax(logits) if is_exclusive else sigmoid(logits)


def features_of(shares: Float64Array) -> Float64Array:
    """The probabilities of all members, one after the other: [members, ..., labels] to
    [..., members x labels]."""
    moved = np.moveaxis(shares, 0, -2)
    return moved.reshape(*moved.shape[:-2], -1)
