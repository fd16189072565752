"""Fit `erf` and `tanh` of csrc/kernels/elementary.h: x * p(x^2) / q(x^2), least in relative error.

python bench/fit_functions.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NUM_NODES, NUM_ROUNDS = 4000, 200


@dataclass(frozen=True)
class OddFunction:
    """One that is 1 in float32 beyond `limit`; degrees in x^2."""

    exact: Callable[[float], float]
    limit: float
    numerator_degree: int
    denominator_degree: int


FUNCTIONS = {"erf": OddFunction(math.erf, 4.0, 6, 4), "tanh": OddFunction(math.tanh, 9.0, 4, 4)}


def fit(function: OddFunction) -> tuple[list[float], list[float], float]:
    """Coefficients in ascending powers of x^2, and the largest relative error in exact arithmetic.

    The problem is made linear by the last round's denominator (Sanathanan and Koerner 1963), and nodes with
    large errors gain weight (Lawson 1961), which leads from least squares to minimax.
    """
    nodes = 0.5 * (1 - np.cos(np.pi * (np.arange(NUM_NODES) + 0.5) / NUM_NODES))  # x^2 / limit^2
    limit = function.limit
    x = limit * np.sqrt(nodes)
    wanted = np.array([function.exact(v) / v for v in x])
    p_powers = nodes[:, None] ** np.arange(function.numerator_degree + 1)
    q_powers = nodes[:, None] ** np.arange(1, function.denominator_degree + 1)
    weights, denominator = 1 / wanted, np.ones(NUM_NODES)
    for _ in range(NUM_ROUNDS):
        scale = weights / np.abs(denominator)
        system = np.concatenate([p_powers, -wanted[:, None] * q_powers], axis=1) * scale[:, None]
        solution, *_ = np.linalg.lstsq(system, wanted * scale, rcond=None)
        p, q = np.split(solution, [function.numerator_degree + 1])
        denominator = 1 + q_powers @ q
        error = np.abs((p_powers @ p / denominator - wanted) / wanted)
        weights = weights * np.sqrt(error / error.max() + 1e-3)
        weights /= weights.max()
    p_scaled = p / limit ** (2 * np.arange(function.numerator_degree + 1))
    q_scaled = q / limit ** (2 * np.arange(1, function.denominator_degree + 1))
    return p_scaled.tolist(), [1.0, *q_scaled.tolist()], float(error.max())


if __name__ == "__main__":
    for name, function in FUNCTIONS.items():
        numerator, denominator, largest_error = fit(function)
        print(f"{name}, p:", *(f"{c:.9e}f" for c in numerator))
        print(f"{name}, q:", *(f"{c:.9e}f" for c in denominator))
        print(f"{name}: largest relative error {largest_error:.1e}")
