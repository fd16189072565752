"""GPTQ against a closed form, against a plain loop over its formulas, and against rounding to nearest."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.quantize.gptq import Solver, inverse_factor
from fastserve.compress.quantize.gram import Gram, output_error
from fastserve.compress.quantize.grid import Grid, find_scales, quantize
from fastserve.errors import CheckpointError
from fastserve.types import Float32Array, Float64Array


def random_problem(
    rows: int = 12, depth: int = 200, *, num_inputs: int = 500
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the Gram matrix of inputs whose columns are correlated and of different sizes."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(depth, depth)) * rng.random(depth) + np.eye(depth)
    x = rng.normal(size=(num_inputs, depth)) @ mixing
    gram = torch.from_numpy(x.T @ x / num_inputs)
    return torch.from_numpy(rng.normal(size=(rows, depth)).astype(np.float32)), gram


def values_of(tensor: GroupedTensor) -> torch.Tensor:
    """Products not rounded."""
    groups = tensor.groups(0, tensor.shape[0])
    of_column = np.arange(tensor.shape[1]) // tensor.group_size
    zeros = 0 if groups.zeros is None else groups.zeros.astype(np.float32)[:, of_column]
    return torch.from_numpy((groups.codes - zeros) * groups.scales[:, of_column]).float()


def plain_gptq(
    values: Float32Array,
    gram: Float64Array,
    scales: Float32Array,
    damping: float,
    *,
    act_order: bool,
) -> Float64Array:
    """Algorithm 1 of the paper without blocks and without Cholesky: the inverse of the Hessian of the columns
    that are left is computed anew for each; scales [rows, groups] are given, codes are of 4 bits."""
    left = values.astype(np.float64)
    hessian = gram + np.eye(len(gram)) * damping * np.mean(np.diag(gram))
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(len(gram))
    rounded = np.zeros_like(left)
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        scale = scales[:, column * scales.shape[1] // values.shape[1]]
        rounded[:, column] = np.clip(np.rint(left[:, column] / scale), -8, 7) * scale
        error = left[:, column] - rounded[:, column]
        left[:, rest] -= np.outer(error, inverse[0]) / inverse[0, 0]
    return rounded


def test_two_columns_are_rounded_as_a_closed_form_says() -> None:
    # Unit scale; inputs of both columns correlated by 0.5. Column 0 goes first: 2.4 becomes 2, and column 1
    # takes error * h01 / h11 of it: 3.4 + 0.4 * 0.5 = 3.6, which becomes 4 and not 3.
    values = torch.tensor([[2.4, 3.4, 7.5]])
    gram = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    grid = Grid(granularity="channel", scale_search=False)
    assert find_scales(values, grid, 3).scales.tolist() == [[1.0]]
    found = Solver(damping=0.0).plan(gram, "w").quantize("w", values, grid)
    assert found.groups(0, 1).codes.tolist() == [[2, 4, 7]]
    assert quantize("w", values, grid).groups(0, 1).codes.tolist() == [[2, 3, 7]]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_blocks_come_to_what_a_plain_loop_comes_to(granularity: str, act_order: bool) -> None:
    values, gram = random_problem(depth=192)
    grid = Grid(granularity=granularity, scale_search=False)  # type: ignore[arg-type]
    columns = grid.columns_of("w", tuple(values.shape))
    found = Solver(damping=0.01, act_order=act_order).plan(gram, "w").quantize("w", values, grid)
    scales = found.groups(0, len(values)).scales
    expected = plain_gptq(values.numpy(), gram.numpy(), scales, damping=0.01, act_order=act_order)
    # A number that lies between two codes to the last bit may fall either way, and others follow: few do.
    is_same = np.isclose(values_of(found).numpy(), expected, atol=1e-4)
    assert is_same.mean() > 0.98
    if act_order or granularity == "channel":
        np.testing.assert_array_equal(scales, find_scales(values, grid, columns).scales)


@pytest.mark.parametrize(("bits", "symmetric"), list(product((8, 4, 3, 2), (True, False))))
def test_outputs_are_nearer_than_those_of_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    values, gram = random_problem()
    grid = Grid(bits=bits, symmetric=symmetric, granularity="channel")
    found = Solver().plan(gram, "w").quantize("w", values, grid)
    nearest = quantize("w", values, grid)
    errors = [output_error(values_of(tensor) - values, gram) for tensor in (found, nearest)]
    assert errors[0] < 0.75 * errors[1]
    low, high = grid.limits
    codes = found.groups(0, len(values)).codes
    assert low <= codes.min() <= codes.max() <= high


def test_groups_are_of_neighbouring_columns_whatever_the_order() -> None:
    values, gram = random_problem(depth=192)
    found = Solver().plan(gram, "w").quantize("w", values, Grid(group_size=32))
    assert found.group_size == 32
    assert found.group_of_column is None
    assert found.groups(0, 12).scales.shape == (12, 6)


def test_zeros_stay_zeros_and_others_make_up_for_them() -> None:
    values, gram = random_problem()
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    for symmetric in (True, False):
        grid = Grid(granularity="channel", symmetric=symmetric)
        found = Solver().plan(gram, "w").quantize("w", values, grid)
        assert (torch.from_numpy(to_f32(found))[values == 0] == 0).all()
        nearest = quantize("w", values, grid)
        assert output_error(values_of(found) - values, gram) < output_error(values_of(nearest) - values, gram)


def test_dead_columns_are_rounded_to_nearest_and_change_no_others() -> None:
    values, gram = random_problem(depth=64)
    dead = [3, 40]
    gram[dead] = 0
    gram[:, dead] = 0
    grid = Grid(granularity="channel", scale_search=False)
    found, nearest = (
        t.groups(0, 12).codes
        for t in (Solver().plan(gram, "w").quantize("w", values, grid), quantize("w", values, grid))
    )
    np.testing.assert_array_equal(found[:, dead], nearest[:, dead])
    other = values.clone()
    other[:, dead] *= -1
    again = Solver().plan(gram, "w").quantize("w", other, grid).groups(0, 12).codes
    alive = np.setdiff1d(np.arange(64), dead)
    np.testing.assert_array_equal(found[:, alive], again[:, alive])


def test_fewer_rows_than_columns_are_damped_until_the_matrix_can_be_inverted() -> None:
    values, gram = random_problem(depth=128, num_inputs=20)
    codes = Solver(damping=0.0).plan(gram, "w").quantize("w", values, Grid()).groups(0, 12).codes
    assert codes.any()


def test_a_gram_matrix_that_is_none_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="w multiplies with has a Gram matrix that cannot be inverted"):
        inverse_factor(-1e9 * torch.ones(4, 4, dtype=torch.float64) + torch.eye(4) * 1e9, 0.01, "w")


def test_a_gram_matrix_adds_up_over_batches_and_is_finite() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(70, 9)).astype(np.float32))
    gram = Gram(9)
    for part in x.split(32):
        gram.add(part)
    np.testing.assert_allclose(gram.matrix("w"), x.double().T @ x.double() / 70, atol=1e-6)
    np.testing.assert_allclose(gram.mean_magnitude, x.abs().mean(0), rtol=1e-5)
    gram.add(torch.full((1, 9), 1e30))
    with pytest.raises(CheckpointError, match="what w multiplies with is too large"):
        gram.matrix("w")
