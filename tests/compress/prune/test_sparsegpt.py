"""SparseGPT against a loop that inverts every Hessian anew, and against least squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compress.working_models import all_values, make_context, random_sequences, working_model
from fastserve.compress.prune.magnitude import Magnitude
from fastserve.compress.prune.pattern import read_pattern
from fastserve.compress.prune.sparsegpt import SparseGpt, inverse_factor, prune_and_update
from fastserve.errors import OptionError
from tiny_models import BERT_CONFIG, LLAMA_CONFIG


def random_problem(rows: int, columns: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and inputs whose columns are correlated."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns))
    return rng.normal(size=(rows, columns)), rng.normal(size=(200, columns)) @ mix


def slow_sparsegpt(
    weights: np.ndarray, hessian: np.ndarray, *, chosen_at_once: int, kept: int | None, sparsity: float
) -> np.ndarray:
    """Column by column: what a row loses at column j is made up by columns after j, optimally for it (OBS);
    masks are chosen for `chosen_at_once` columns, over all rows, or of each row all but `kept`."""
    weights = weights.copy()
    columns = weights.shape[1]
    cost = np.asarray([np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(columns)])
    gone = np.zeros(weights.shape, bool)
    for j in range(columns):
        if j % chosen_at_once == 0:
            block = slice(j, min(j + chosen_at_once, columns))
            scores = weights[:, block] ** 2 / cost[block]
            groups = scores if kept is not None else scores.reshape(1, -1)
            count = scores.shape[1] - kept if kept is not None else round(sparsity * scores.size)
            mask = np.zeros(groups.shape, bool)
            np.put_along_axis(mask, np.argsort(groups, axis=1)[:, :count], True, axis=1)
            gone[:, block] = mask.reshape(scores.shape)
        inverse = np.linalg.inv(hessian[j:, j:])
        for row in np.flatnonzero(gone[:, j]):
            weights[row, j:] -= weights[row, j] / inverse[0, 0] * inverse[0]
        weights[gone[:, j], j] = 0
    return weights


@pytest.mark.parametrize(
    ("pattern", "block_size", "at_once", "kept"),
    [("unstructured", 8, 8, None), ("unstructured", 100, 24, None), ("2:4", 8, 4, 2), ("1:8", 3, 8, 1)],
)
def test_it_is_the_loop_that_inverts_every_hessian(
    pattern: str, block_size: int, at_once: int, kept: int | None
) -> None:
    weights, x = random_problem(6, 24)
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * np.eye(24)
    sparsity = None if kept is not None else 0.5
    factor = inverse_factor(torch.from_numpy(gram), damping=0.01, name="w")
    found = prune_and_update(
        torch.from_numpy(weights.astype(np.float32)),
        factor,
        read_pattern(pattern, sparsity),
        block_size=block_size,
    ).numpy()
    expected = slow_sparsegpt(weights, damped, chosen_at_once=at_once, kept=kept, sparsity=0.5)
    assert ((found == 0) == (expected == 0)).all()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_of_two_columns_the_second_becomes_the_least_squares_solution() -> None:
    _, x = random_problem(1, 2)
    weights = torch.tensor([[1e-3, 1.0]])
    factor = inverse_factor(torch.from_numpy(x.T @ x), damping=1e-9, name="w")
    found = prune_and_update(weights, factor, read_pattern("1:2", None), block_size=2)
    target = x @ weights[0].double().numpy()
    best = float(x[:, 1] @ target / (x[:, 1] @ x[:, 1]))
    assert found[0, 0] == 0
    assert float(found[0, 1]) == pytest.approx(best, rel=1e-5)


def test_blocks_go_whole() -> None:
    weights, x = random_problem(8, 24)
    factor = inverse_factor(torch.from_numpy(x.T @ x), damping=0.01, name="w")
    pruned = prune_and_update(
        torch.from_numpy(weights.astype(np.float32)), factor, read_pattern("4x3", 0.5), block_size=10
    ).numpy()
    blocks = (pruned == 0).reshape(2, 4, 8, 3).swapaxes(1, 2).reshape(-1, 12)
    assert (blocks.all(axis=1) == blocks.any(axis=1)).all()
    assert blocks.all(axis=1).sum() == 8


@pytest.mark.parametrize("config", [LLAMA_CONFIG, BERT_CONFIG], ids=["llama", "bert"])
def test_it_loses_less_of_the_outputs_than_magnitude_at_the_same_sparsity(
    tmp_path: Path, config: dict[str, object]
) -> None:
    sequences = random_sequences(97, 8, 32)
    model = working_model(config)
    context = make_context(tmp_path, calibration=sequences)
    pruned = all_values(SparseGpt(sparsity=0.5, block_size=12).run(model, context))
    by_magnitude = all_values(Magnitude(sparsity=0.5).run(model, context))
    lost = {layer.name: layer.relative_error for layer in context.layers if layer.step == "sparsegpt"}
    assert len(lost) >= 18
    for name in lost:
        assert (pruned[name] == 0).mean() == pytest.approx(0.5, abs=0.01)
        assert (by_magnitude[name] == 0).mean() == pytest.approx(0.5, abs=0.01)
    from_magnitude = {layer.name: layer.relative_error for layer in context.layers if layer.on == "weights"}
    # Of correlated inputs some is made up: less is lost than was taken from the weights.
    assert sum(lost.values()) < 0.9 * sum(from_magnitude[name] for name in lost)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weights, x = random_problem(4, 8)
    x[:, 3] = 0
    factor = inverse_factor(torch.from_numpy(x.T @ x), damping=0.01, name="w")
    pruned = prune_and_update(
        torch.from_numpy(weights.astype(np.float32)), factor, read_pattern("unstructured", 0.5), block_size=8
    )
    assert torch.isfinite(pruned).all()


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match="block_size=0"):
        SparseGpt(block_size=0)
    with pytest.raises(OptionError, match="damping=0"):
        SparseGpt(damping=0.0)
