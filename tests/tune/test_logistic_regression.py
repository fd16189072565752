"""The regression of stacking, against PyTorch's optimizer on the same loss."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve.tune.logistic_regression import fit_logistic_regression, minimize


@pytest.mark.parametrize("is_exclusive", [True, False])
def test_the_coefficients_are_those_that_torch_finds(is_exclusive: bool) -> None:
    import torch
    from torch.nn import functional

    generator = np.random.default_rng(3)
    features = generator.random((80, 6))
    drawn = (features @ generator.normal(size=(6, 3)) * 3 + generator.gumbel(size=(80, 3))).argmax(axis=1)
    targets = np.eye(3)[drawn]
    if not is_exclusive:
        targets[::3, 0] = 1.0
    found = fit_logistic_regression(features, targets, is_exclusive=is_exclusive, penalty=0.5)

    x, t = torch.from_numpy(features), torch.from_numpy(targets)
    weights = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=1000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ weights.T + bias
        if is_exclusive:
            error = functional.cross_entropy(logits, t, reduction="sum")
        else:
            error = functional.binary_cross_entropy_with_logits(logits, t, reduction="sum")
        total = error + 0.25 * (weights**2).sum()
        total.backward()
        return total

    optimizer.step(loss)
    assert found.coefficients == pytest.approx(weights.detach().numpy(), abs=1e-4)
    assert found.intercepts == pytest.approx(bias.detach().numpy(), abs=1e-4)


def test_labels_that_are_told_apart_perfectly_have_an_answer_still() -> None:
    features = np.repeat(np.eye(2), 20, axis=0)
    found = fit_logistic_regression(features, features, is_exclusive=True)
    assert np.isfinite(found.coefficients).all()
    logits = features @ found.coefficients.T + found.intercepts
    assert (logits.argmax(axis=1) == features.argmax(axis=1)).all()


def test_a_valley_that_is_long_and_narrow_is_followed_to_its_end() -> None:
    scales = np.logspace(0, 5, 12)
    goal = np.arange(12.0)
    found = minimize(
        lambda x: (float((scales * (x - goal) ** 2).sum() / 2), scales * (x - goal)),
        np.zeros(12),
        tolerance=1e-8,
    )
    assert found == pytest.approx(goal, abs=1e-6)
