"""Wanda against its formula, on what `transformers` feeds the same layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.working_models import all_values, make_context, random_sequences, working_model
from fastserve.compress.prune.wanda import Wanda
from fastserve.compress.step import Targets
from fastserve.errors import DataError, OptionError
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, hf_model

SEQUENCES = random_sequences(97, 6, 20)


def inputs_of_linears(model: Any) -> dict[str, np.ndarray]:
    """What every linear layer of a `transformers` model multiplies with, of all sequences [rows, in]."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0][0])
            )
    with torch.no_grad():
        for ids in SEQUENCES:
            model(torch.tensor([ids]))
    return {name: torch.cat(parts).numpy() for name, parts in seen.items()}


@pytest.mark.parametrize("config", [LLAMA_CONFIG, BERT_CONFIG], ids=["llama", "bert"])
def test_the_first_layer_s_masks_are_those_of_the_formula(tmp_path: Path, config: dict[str, Any]) -> None:
    model = working_model(config)
    before = all_values(model)
    after = all_values(Wanda(sparsity=0.5).run(model, make_context(tmp_path, calibration=SEQUENCES)))
    inputs = inputs_of_linears(hf_model(config))
    # Nothing has been pruned before the first station: the inputs are those of the whole model.
    first = [name for name in before if "layers.0.self_attn" in name or "layer.0.attention.self" in name]
    first = [name for name in first if before[name].ndim == 2 and "o_proj" not in name]
    assert len(first) == 3
    for name in first:
        scores = np.abs(before[name]) * np.sqrt(np.square(inputs[name]).sum(axis=0))
        order = np.argsort(scores, axis=1)
        for row, columns in enumerate(order):
            assert not after[name][row, columns[:12]].any()
            assert (after[name][row, columns[12:]] == before[name][row, columns[12:]]).all()


def test_later_stations_see_what_pruned_ones_give(tmp_path: Path) -> None:
    only_first = Wanda(sparsity=0.9, targets=Targets(include=r"layers\.0\.mlp\.(gate|up)_proj"))
    both = Wanda(sparsity=0.9, targets=Targets(include=r"layers\.0\.mlp"))
    name = "model.layers.0.mlp.down_proj.weight"
    model, context = working_model(LLAMA_CONFIG), make_context(tmp_path, calibration=SEQUENCES)
    stepwise = all_values(both.run(only_first.run(model, context), context))[name]
    at_once = all_values(both.run(model, context))[name]
    assert (stepwise == at_once).all()


def test_errors_of_outputs_are_those_of_the_products(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    model, context = working_model(LLAMA_CONFIG), make_context(tmp_path, calibration=SEQUENCES)
    after = all_values(Wanda(pattern="2:4", targets=Targets(include=name)).run(model, context))[name]
    before, x = all_values(model)[name], inputs_of_linears(hf_model(LLAMA_CONFIG))[name]
    expected = np.square(x @ (before - after).T).sum() / np.square(x @ before.T).sum()
    assert [layer.on for layer in context.layers] == ["outputs"]
    assert context.layers[0].relative_error == pytest.approx(expected, rel=1e-4)
    assert ((after != 0).reshape(-1, 4).sum(axis=1) == 2).all()


def test_within_a_matrix_rows_lose_unequal_shares_and_within_rows_equal_ones(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    model, context = working_model(LLAMA_CONFIG), make_context(tmp_path, calibration=SEQUENCES)
    for scope, is_equal in (("row", True), ("matrix", False)):
        step = Wanda(sparsity=0.25, scope=scope, targets=Targets(include=name))  # type: ignore[arg-type]
        zeros = (all_values(step.run(model, context))[name] == 0).sum(axis=1)
        assert zeros.sum() == 24 * 6
        assert (len(set(zeros)) == 1) is is_equal


def test_without_calibration_text_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no calibration text"):
        Wanda().run(working_model(LLAMA_CONFIG), make_context(tmp_path))
    with pytest.raises(OptionError, match="scope='global' is unknown"):
        Wanda(scope="global")  # type: ignore[arg-type]
