"""Codes, scales and zero points of every grid, against a plain rounding of their own."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from fastserve.checkpoint.convert import from_bf16, to_bf16, to_f32
from fastserve.compress.quantize.grid import Grid, find_scales, quantize
from fastserve.errors import OptionError
from fastserve.types import Float32Array


def random_matrix(rows: int = 6, depth: int = 128) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_t(4, size=(rows, depth)).astype(np.float32))


def plain_rounding(
    group: Float32Array, bits: int, symmetric: bool, shrink: float = 1.0
) -> tuple[Float32Array, float]:
    """One group's numbers on the grid, and the squared error."""
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least = -127 if bits == 8 and symmetric else least
    low, high = min(float(group.min()), 0.0) * shrink, max(float(group.max()), 0.0) * shrink
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = float(from_bf16(to_bf16(np.asarray([(high - low) / (most - least)], np.float32)))[0])
    zero = 0.0 if symmetric else float(np.clip(np.rint(least - low / scale), least, most))
    codes = np.clip(np.rint(group / np.float32(scale)) + zero, least, most)
    values = ((codes - zero) * scale).astype(np.float32)
    return values, float(np.square(values - group).sum())


@pytest.mark.parametrize(
    ("bits", "symmetric", "granularity"),
    list(product((8, 4, 3, 2), (True, False), ("tensor", "channel", "group"))),
)
def test_rounding_is_to_the_nearest_of_the_grid(bits: int, symmetric: bool, granularity: Any) -> None:
    values = random_matrix()
    grid = Grid(bits=bits, symmetric=symmetric, granularity=granularity, group_size=32, scale_search=False)
    tensor = quantize("w", values, grid)
    codes, zeros, scales = tensor.groups(0, 6)
    size = {"tensor": 128, "channel": 128, "group": 32}[granularity]
    assert tensor.group_size == size
    assert scales.shape == (6, 128 // size)
    whole = [values.numpy().reshape(-1)] if granularity == "tensor" else values.numpy().reshape(-1, size)
    expected = np.stack([plain_rounding(group, bits, symmetric)[0] for group in whole]).reshape(6, 128)
    of_column = np.arange(128) // size
    found = (codes - (0 if zeros is None else zeros.astype(np.float32)[:, of_column])) * scales[:, of_column]
    # A weight midway between two numbers of the grid may become either.
    step = scales[:, of_column]
    assert (np.abs(found - expected) <= step * 1.001).all()
    assert np.isclose(found, expected, rtol=1e-6).mean() > 0.995
    assert np.abs(found - values.numpy())[np.abs(found - expected) > 0].size < 4
    low, high = grid.limits
    assert low <= codes.min() <= codes.max() <= high


@pytest.mark.parametrize(("bits", "symmetric"), list(product((8, 4, 3, 2), (True, False))))
def test_a_scale_search_finds_the_best_of_the_shares_that_it_tries(bits: int, symmetric: bool) -> None:
    values = random_matrix()
    grid = Grid(bits=bits, symmetric=symmetric, granularity="group", group_size=32)
    scales = find_scales(values, grid, 32)
    errors = (scales.round(values) - values).reshape(-1, 32).square().sum(1).numpy()
    for group, error in zip(values.numpy().reshape(-1, 32), errors, strict=True):
        least = min(plain_rounding(group, bits, symmetric, shrink)[1] for shrink in grid.shrinks)
        assert error <= least * 1.001


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_are_numbers_of_every_grid(symmetric: bool) -> None:
    values = random_matrix() + 3
    values[:, ::5] = 0
    for bits in (8, 4, 3, 2):
        tensor = quantize("w", values, Grid(bits=bits, symmetric=symmetric, granularity="channel"))
        assert (to_f32(tensor)[:, ::5] == 0).all()


def test_a_matrix_of_zeros_has_codes_and_scales_of_zero() -> None:
    groups = quantize("w", torch.zeros(2, 64), Grid(symmetric=False)).groups(0, 2)
    assert not groups.codes.astype(bool).any() or groups.zeros is not None
    assert (to_f32(quantize("w", torch.zeros(2, 64), Grid(symmetric=False))) == 0).all()


def test_a_loss_of_ones_own_decides_what_is_clipped() -> None:
    values = torch.zeros(1, 32)
    values[0] = torch.linspace(-0.5, 0.5, 32)
    values[0, 7] = 4.0
    grid = Grid(granularity="channel")
    weights = torch.ones(32)
    weights[7] = 1e-6  # an outlier that does not matter is clipped
    by_weights = find_scales(values, grid, 32, loss=lambda errors, b, e: (errors.square() * weights).sum(2))
    assert by_weights.scales.item() < 0.5 * find_scales(values, grid, 32).scales.item()


def test_scales_are_numbers_of_their_format() -> None:
    for scale_format, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        scales = find_scales(random_matrix(), Grid(scale_format=scale_format), 64).scales  # type: ignore[arg-type]
        assert torch.equal(scales, scales.to(dtype).float())


def test_a_group_size_that_does_not_divide_is_told_with_those_that_do() -> None:
    with pytest.raises(
        OptionError, match=r"layer\.w \[2, 96\] cannot be quantized in groups of 64"
    ) as caught:
        quantize("layer.w", torch.ones(2, 96), Grid(group_size=64))
    assert "group_size may be 32" in str(caught.value.hint)
    assert quantize("w", torch.ones(2, 96), Grid(group_size=64, misfit="channel")).group_size == 96


@pytest.mark.parametrize(
    ("options", "named"),
    [({"bits": 5}, "bits"), ({"group_size": 48}, "group_size"), ({"scale_format": "f32"}, "scale_format")],
)
def test_options_that_are_none_are_errors(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Grid(**options)
