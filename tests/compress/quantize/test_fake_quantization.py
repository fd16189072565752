"""Straight-through gradients against closed forms, and what modules compute with while they learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastserve.compress.quantize.fake_quantization import (
    FakeQuantization,
    Quantizer,
    fake_quantize,
    matching_name,
    round_activations,
)
from fastserve.compress.quantize.grid import Grid, quantize
from fastserve.errors import OptionError, UnsupportedError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, size=shape).astype(np.float32))


class Tied(nn.Module):
    """A table that is the head too, and a linear layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 32)
        self.middle = nn.Linear(32, 32)
        self.head = nn.Linear(32, 8, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.middle(self.table(ids)))
        return logits


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_straight_through_estimator_and_of_learned_step_sizes(
    bits: int, symmetric: bool
) -> None:
    """Equation 3 of the LSQ paper, a group at a time in numpy."""
    grid = Grid(bits=bits, symmetric=symmetric, group_size=32)
    least, most = grid.limits
    weight, gradient = random(3, 64), random(3, 64, seed=1)
    scales = torch.full((3, 2), 0.5) * torch.tensor([[1.0], [2.0], [0.25]])
    zeros = None if symmetric else torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
    w, s = weight.clone().requires_grad_(), scales.clone().requires_grad_()
    result = fake_quantize(w, s, zeros, grid, 32)
    result.backward(gradient)
    assert w.grad is not None
    assert s.grad is not None
    for row in range(3):
        for group in range(2):
            at = slice(32 * group, 32 * group + 32)
            scale, zero = float(scales[row, group]), 0.0 if zeros is None else float(zeros[row, group])
            x, g = weight[row, at].numpy() / scale + zero, gradient[row, at].numpy()
            codes = np.rint(np.clip(x, least, most))
            np.testing.assert_allclose(result[row, at].detach(), (codes - zero) * scale, rtol=1e-6)
            inside = (least < x) & (x < most)
            np.testing.assert_array_equal(w.grad[row, at], np.where(inside, g, 0))
            slope = np.where(inside, codes - x, np.where(x <= least, least - zero, most - zero))
            factor = 1 / np.sqrt(32 * most)
            assert float(s.grad[row, group]) == pytest.approx(factor * (g * slope).sum(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("learns_scales", [True, False])
def test_a_quantizer_begins_with_the_numbers_of_rtn(granularity: str, learns_scales: bool) -> None:
    grid = Grid(bits=3, granularity=granularity, group_size=32)  # type: ignore[arg-type]
    weight = nn.Parameter(random(6, 64))
    columns = grid.columns_of("w", (6, 64))
    found = Quantizer(weight, grid, columns, learns_scales=learns_scales)()
    codes, _, scales = quantize("w", weight.detach(), grid).groups(0, 6)
    expected = codes * scales[:, np.arange(64) // columns]
    np.testing.assert_array_equal(found.detach().numpy(), expected)


def test_scales_follow_the_weights_of_each_step_where_they_are_those_of_rtn() -> None:
    grid, weight = Grid(bits=3, group_size=32), nn.Parameter(random(4, 32))
    quantizer = Quantizer(weight, grid, 32, learns_scales=False)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    with torch.inference_mode():
        quantizer()
    quantizer().square().sum().backward()
    optimizer.step()
    codes, _, scales = quantize("w", weight.detach(), grid).groups(0, 4)
    np.testing.assert_array_equal(quantizer().detach().numpy(), codes * scales)
    np.testing.assert_array_equal(quantizer.state_dict()["scales"].numpy(), scales)


def test_learned_scales_stay_positive_and_in_their_format() -> None:
    weight = nn.Parameter(random(4, 64) * 1e-3)
    quantizer = Quantizer(weight, Grid(bits=2, group_size=32), 32, learns_scales=True)
    optimizer = torch.optim.Adam([quantizer.change], lr=1e-3)  # type: ignore[list-item]
    before = quantizer.scales.clone()
    for _ in range(20):
        optimizer.zero_grad()
        (quantizer() * 1e3).sum().backward()
        optimizer.step()
    after = quantizer.state_dict()["scales"]
    assert (after > 0).all()
    assert (after != before).all()
    assert (after == after.bfloat16().float()).all()


def test_modules_that_share_a_matrix_compute_with_the_same_numbers_and_names_stay() -> None:
    model = Tied()
    names = dict(model.named_parameters()).keys()
    change = FakeQuantization(names=("table.weight", "middle.weight"), grid=Grid(bits=2, group_size=32))
    change.apply(model)
    assert dict(model.named_parameters()).keys() - names == {
        "fake_quantization.0.change",
        "fake_quantization.1.change",
    }
    ids = torch.arange(8)
    assert len(model.table(ids).unique()) <= 4 * 8
    np.testing.assert_array_equal(model.table(ids).detach(), model.head.weight.detach())
    model(ids).sum().backward()
    assert model.table._parameters["weight"].grad is not None  # type: ignore[union-attr]
    assert model.state_dict()["table.weight"].unique().numel() == 8 * 32


@pytest.mark.parametrize(("width", "columns"), [(64, 64), (172, 64), (64, 32), (20, 20)])
def test_activations_are_rounded_token_by_token_and_group_by_group(width: int, columns: int) -> None:
    x = random(2, 5, width)
    x[0, 0] = 0
    found = round_activations(x, columns).numpy()
    for token in np.ndindex(2, 5):
        for begin in range(0, width, columns):
            group = x[token][begin : begin + columns].numpy()
            largest = np.abs(group).max()
            codes = np.rint(group * (np.float32(127) / largest)) if largest else 0 * group
            expected = codes * (largest / np.float32(127))
            np.testing.assert_allclose(found[token][begin : begin + columns], expected, rtol=1e-6)


def test_gradients_go_through_rounded_activations_as_they_are() -> None:
    model = Tied()
    grid = Grid(bits=4, group_size=32)
    FakeQuantization(names=("middle.weight",), grid=grid, activations="int8").apply(model)
    x = random(3, 32).requires_grad_()
    nn.init.zeros_(model.middle.bias)
    found = model.middle(x)
    found.sum().backward()
    weight = model.middle.weight.detach()
    np.testing.assert_allclose(found.detach(), round_activations(x.detach(), 32) @ weight.T, rtol=1e-5)
    np.testing.assert_allclose(x.grad, weight.sum(0).expand(3, -1), rtol=1e-6)


def test_a_name_is_found_with_another_beginning_and_never_guessed() -> None:
    assert matching_name("bert.a.weight", ["a.weight", "b.weight"]) == "a.weight"
    with pytest.raises(UnsupportedError, match=r"a\.weight is not found in the model that is tuned: nothing"):
        matching_name("a.weight", ["b.weight"])
    with pytest.raises(UnsupportedError, match=r"x\.a\.weight, y\.a\.weight is like it"):
        matching_name("a.weight", ["x.a.weight", "y.a.weight"])


def test_what_is_no_matrix_of_a_layer_or_a_group_that_does_not_divide_is_refused() -> None:
    model = nn.Sequential(nn.Linear(20, 4), nn.LayerNorm(4))
    with pytest.raises(UnsupportedError, match=r"1\.weight is neither a linear layer's nor a table's"):
        FakeQuantization(names=("1.weight",), grid=Grid()).apply(model)
    with pytest.raises(OptionError, match=r"0\.weight \[4, 20\] cannot be quantized in groups of 64"):
        FakeQuantization(names=("0.weight",), grid=Grid()).apply(model)
