"""Fit the coefficients of `erf` in csrc/kernels/elementary.h: x * p(x^2) / q(x^2), least in relative error.

python bench/fit_erf.py
"""

from __future__ import annotations

import math

import numpy as np

LIMIT = 4.0  # erf is 1 in float32 beyond
NUMERATOR_DEGREE, DENOMINATOR_DEGREE = 6, 4  # in x^2
NUM_NODES, NUM_ROUNDS = 4000, 200


def fit() -> tuple[list[float], list[float], float]:
    """Coefficients in ascending powers of x^2, and the largest relative error in exact arithmetic.

    The problem is made linear by the last round's denominator (Sanathanan and Koerner 1963), and nodes with
    large errors gain weight (Lawson 1961), which leads from least squares to minimax.
    """
    nodes = 0.5 * (1 - np.cos(np.pi * (np.arange(NUM_NODES) + 0.5) / NUM_NODES))  # x^2 / LIMIT^2
    x = LIMIT * np.sqrt(nodes)
    wanted = np.array([math.erf(v) / v for v in x])
    p_powers = nodes[:, None] ** np.arange(NUMERATOR_DEGREE + 1)
    q_powers = nodes[:, None] ** np.arange(1, DENOMINATOR_DEGREE + 1)
    weights, denominator = 1 / wanted, np.ones(NUM_NODES)
    for _ in range(NUM_ROUNDS):
        scale = weights / np.abs(denominator)
        system = np.concatenate([p_powers, -wanted[:, None] * q_powers], axis=1) * scale[:, None]
        solution, *_ = np.linalg.lstsq(system, wanted * scale, rcond=None)
        p, q = solution[: NUMERATOR_DEGREE + 1], solution[NUMERATOR_DEGREE + 1 :]
        denominator = 1 + q_powers @ q
        error = np.abs((p_powers @ p / denominator - wanted) / wanted)
        weights = weights * np.sqrt(error / error.max() + 1e-3)
        weights /= weights.max()
    p_scaled = p / LIMIT ** (2 * np.arange(NUMERATOR_DEGREE + 1))
    q_scaled = q / LIMIT ** (2 * np.arange(1, DENOMINATOR_DEGREE + 1))
    return p_scaled.tolist(), [1.0, *q_scaled.tolist()], float(error.max())


if __name__ == "__main__":
    numerator, denominator, largest_error = fit()
    print("p:", *(f"{c:.9e}f" for c in numerator))
    print("q:", *(f"{c:.9e}f" for c in denominator))
    print(f"largest relative error {largest_error:.1e}")
