"""Logistic regression, by which an ensemble learns whom to believe: fitted by L-BFGS in numpy, as it is small
and nothing else here would need a library for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastserve.types import Float64Array

_MEMORY = 10  # steps whose curvature is kept; Liu and Nocedal 1989 find 3 to 7 enough, more cost little
_MOST_STEPS = 2000
_TOLERANCE = 1e-7  # of the gradient's largest component, for each row
_SUFFICIENT = 1e-4  # share of the promised decrease that a step must keep (Nocedal and Wright, section 3.1)

Objective = Callable[[Float64Array], tuple[float, Float64Array]]
"""Of a point [n]: its value, and its gradient [n]."""


class LogisticRegression(NamedTuple):
    """`coefficients` [labels, features] and `intercepts` [labels]: logits are features @ coefficients.T +
    intercepts."""

    coefficients: Float64Array
    intercepts: Float64Array


def fit_logistic_regression(
    features: Float64Array, targets: Float64Array, *, is_exclusive: bool, penalty: float = 1.0
) -> LogisticRegression:
    """The regression with the least cross entropy, summed over rows, plus penalty / 2 x the sum of squared
    coefficients (Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, section 4.4; as
    scikit-learn's, with C = 1 / penalty). Intercepts are free.

    >>> model = fit_logistic_regression(
    ...     np.array([[0.0], [1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]]), is_exclusive=True
    ... )
    >>> (np.array([[0.0], [1.0]]) @ model.coefficients.T + model.intercepts).argmax(axis=1).tolist()
    [0, 1]

    Args:
        features: [rows, features].
        targets: [rows, labels], 1 where a label is right, else 0.
        is_exclusive: each row has one label: softmax over them; else each label is a question of its own.
        penalty: above 0, so that there is one best answer, however well labels are told apart.
    """
    num_labels, num_features = targets.shape[1], features.shape[1]

    def objective(point: Float64Array) -> tuple[float, Float64Array]:
        weights = point.reshape(num_labels, num_features + 1)
        logits = features @ weights[:, :-1].T + weights[:, -1]
        if is_exclusive:
            most = logits.max(axis=1, keepdims=True)
            powers = np.exp(logits - most)
            sums = powers.sum(axis=1, keepdims=True)
            loss = float((np.log(sums) + most).sum() - (targets * logits).sum())
            errors = powers / sums - targets
        else:
            loss = float((np.logaddexp(0, logits) - targets * logits).sum())
            errors = np.exp(-np.logaddexp(0, -logits)) - targets
        gradient = np.concatenate([errors.T @ features, errors.sum(axis=0)[:, None]], axis=1)
        gradient[:, :-1] += penalty * weights[:, :-1]
        loss += penalty / 2 * float((weights[:, :-1] ** 2).sum())
        return loss, gradient.reshape(-1)

    start = np.zeros(num_labels * (num_features + 1))
    found = minimize(objective, start, tolerance=_TOLERANCE * len(features))
    weights = found.reshape(num_labels, num_features + 1)
    return LogisticRegression(weights[:, :-1], weights[:, -1])


def minimize(objective: Objective, start: Float64Array, *, tolerance: float) -> Float64Array:
    """Where a smooth convex function is least, by L-BFGS (Nocedal and Wright, Numerical Optimization,
    algorithms 7.4 and 7.5) with steps halved until they are worth it: up to a gradient no component of which
    is above `tolerance`, or to where steps change nothing."""
    point = start
    value, gradient = objective(point)
    history: deque[tuple[Float64Array, Float64Array]] = deque(maxlen=_MEMORY)  # steps, changes of gradient
    for _ in range(_MOST_STEPS):
        if np.abs(gradient).max() <= tolerance:
            break
        direction = -_approximate_newton(gradient, history)
        slope = float(direction @ gradient)
        length = 1.0 if history else 1 / max(1.0, float(np.linalg.norm(gradient)))
        while True:
            new_point = point + length * direction
            new_value, new_gradient = objective(new_point)
            if new_value <= value + _SUFFICIENT * length * slope:
                break
            length /= 2
            if length < 1e-12:  # the numbers do not tell any better
                return point
        change, turn = new_point - point, new_gradient - gradient
        if change @ turn > 0:
            history.append((change, turn))
        point, value, gradient = new_point, new_value, new_gradient
    return point


def _approximate_newton(
    gradient: Float64Array, history: deque[tuple[Float64Array, Float64Array]]
) -> Float64Array:
    """The gradient times an approximate inverse of the Hessian, of the steps so far."""
    result = gradient.copy()
    shares = []
    for change, turn in reversed(history):
        share = float(change @ result) / float(change @ turn)
        result -= share * turn
        shares.append(share)
    if history:
        change, turn = history[-1]
        result *= float(change @ turn) / float(turn @ turn)
    for (change, turn), share in zip(history, reversed(shares), strict=True):
        result += (share - float(turn @ result) / float(change @ turn)) * change
    return result
