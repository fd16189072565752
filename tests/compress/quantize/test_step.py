"""The steps that quantize, on tiny models: what becomes of tensors, of outputs, and of bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.working_models import (
    TINY,
    calibrated_context,
    ragged_sequences,
    random_working_model,
    working_model,
)
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.quantize.awq import Awq
from fastserve.compress.quantize.smoothquant import SmoothQuant
from fastserve.compress.quantize.step import Gptq, Rtn
from fastserve.compress.recipe import parse_recipe
from fastserve.compress.step import Step, Targets, WorkingModel
from fastserve.errors import CheckpointError, DataError, OptionError
from fastserve.types import Float32Array
from parity import compile_graph, run_embeddings, run_logits, store_f32
from tiny_models import LLAMA_CONFIG, random_parameters, tiny_graph

WIDE: dict[str, Any] = {
    **LLAMA_CONFIG,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
ROWS: dict[str, Any] = {"bits": 3, "granularity": "channel"}


def outputs(model: WorkingModel) -> Float32Array:
    """Of all calibration sequences: [rows, vocab], or [sequences, hidden]."""
    config = dict(model.config)
    parameters = {name: to_f32(tensor) for name, tensor in model.tensors.items()}
    executable = compile_graph("torch", tiny_graph(config), parameters, max_context=128)
    run = (lambda s: run_embeddings(executable, [s])) if config["model_type"] == "bert" else None
    return np.concatenate([run(s) if run else run_logits(executable, s) for s in ragged_sequences()])


def relative_error(model: WorkingModel, changed: WorkingModel) -> float:
    expected = outputs(model)
    return float(np.square(outputs(changed) - expected).sum() / np.square(expected).sum())


def with_outliers(config: dict[str, Any]) -> WorkingModel:
    """Whose norms make two columns thirty times as large as others, as they are in language models."""
    parameters = random_parameters(tiny_graph(config))
    for name, values in parameters.items():
        if name.endswith("norm.weight"):
            values[:] = 1 + 0.1 * values
            values[[5, 11]] *= 30
    return working_model(config, parameters)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("step", [Rtn(**ROWS), Gptq(**ROWS), Awq(**ROWS), SmoothQuant()])
def test_all_linears_become_whole_numbers_and_nothing_else_does(
    step: Step, kind: str, tmp_path: Path
) -> None:
    model = random_working_model(TINY[kind])
    quantized = step.run(model, calibrated_context(tmp_path))
    names = model.matrices(Targets())
    grouped = {n for n, tensor in quantized.tensors.items() if isinstance(tensor, GroupedTensor)}
    assert grouped == set(names)
    assert {quantized.tensors[name].bits for name in names} == {8 if isinstance(step, SmoothQuant) else 3}  # type: ignore[attr-defined]
    assert all(quantized.tensors[name].name == name for name in names)
    assert list(quantized.tensors) == list(model.tensors)
    assert 0 < relative_error(model, quantized) < 0.5


@pytest.mark.parametrize("kind", TINY)
def test_gptq_and_awq_lose_less_than_rounding_to_nearest(kind: str, tmp_path: Path) -> None:
    model = with_outliers(WIDE) if kind == "llama" else random_working_model(TINY[kind])
    losses = {
        step: relative_error(model, step(**ROWS).run(model, calibrated_context(tmp_path / step.__name__)))
        for step in (Rtn, Gptq, Awq)
    }
    assert losses[Gptq] < 0.8 * losses[Rtn]
    assert losses[Awq] < 0.95 * losses[Rtn]


def test_embeddings_and_heads_are_quantized_where_they_are_asked_for(tmp_path: Path) -> None:
    model = random_working_model(LLAMA_CONFIG)
    tied = random_working_model({**LLAMA_CONFIG, "tie_word_embeddings": True})
    targets = Targets(tables=True)
    for step in (Rtn(**ROWS, targets=targets), Gptq(**ROWS, targets=targets), Awq(**ROWS, targets=targets)):
        both = step.run(model, calibrated_context(tmp_path))
        assert isinstance(both.tensors["model.embed_tokens.weight"], GroupedTensor)
        assert isinstance(both.tensors["lm_head.weight"], GroupedTensor)
        one = step.run(tied, calibrated_context(tmp_path))
        assert isinstance(one.tensors["model.embed_tokens.weight"], GroupedTensor)


def test_what_a_step_did_to_each_matrix_is_told(tmp_path: Path) -> None:
    model, context = random_working_model(LLAMA_CONFIG), calibrated_context(tmp_path)
    Rtn(**ROWS).run(model, context)
    Gptq(**ROWS).run(model, context)
    names = list(model.matrices(Targets()))
    assert [layer.name for layer in context.layers if layer.step == "rtn"] == names
    assert {layer.on for layer in context.layers if layer.step == "rtn"} == {"weights"}
    assert sorted(layer.name for layer in context.layers if layer.step == "gptq") == sorted(names)
    assert all(0 < layer.relative_error < 0.2 for layer in context.layers)


def test_zeros_of_a_pruned_model_are_kept(tmp_path: Path) -> None:
    parameters = random_parameters(tiny_graph(LLAMA_CONFIG))
    rng = np.random.default_rng(0)
    for name, values in parameters.items():
        if "proj" in name:
            values[rng.random(values.shape) < 0.5] = 0
    model = working_model(LLAMA_CONFIG, parameters)
    for step in (Rtn(**ROWS), Gptq(**ROWS), Awq(**ROWS), Gptq(**ROWS, symmetric=False)):
        quantized = step.run(model, calibrated_context(tmp_path))
        for name in model.matrices(Targets()):
            assert (to_f32(quantized.tensors[name])[parameters[name] == 0] == 0).all()


def test_smoothing_takes_outliers_from_activations() -> None: ...


def test_steps_that_calibrate_need_text(tmp_path: Path) -> None:
    model, context = random_working_model(LLAMA_CONFIG), calibrated_context(tmp_path, calibration=())
    for step in (Gptq(**ROWS), Awq(**ROWS), SmoothQuant()):
        assert step.needs == {"calibration"}
        with pytest.raises(DataError, match="no calibration text"):
            step.run(model, context)


def test_a_matrix_that_does_not_fit_is_told_by_name_before_anything_is_computed(tmp_path: Path) -> None:
    model = random_working_model(LLAMA_CONFIG)
    context = calibrated_context(tmp_path)
    for step in (Rtn(), Gptq(), Awq()):
        with pytest.raises(
            OptionError, match=r"layers\.0\.\S+ \[\d+, 24\] cannot be quantized in groups of 64"
        ):
            step.run(model, context)
    assert not context.layers
    Rtn(misfit="channel").run(model, context)
    assert "21 matrices have a scale for each row" in context.notes[0]


def test_weights_that_are_not_finite_are_told_by_name(tmp_path: Path) -> None:
    model = random_working_model(LLAMA_CONFIG)
    name = "model.layers.1.mlp.down_proj.weight"
    broken = to_f32(model.tensors[name]).copy()
    broken[0, 0] = np.inf
    model = model.with_tensors(store_f32({name: broken}))
    for step in (Rtn(**ROWS), Gptq(**ROWS), Awq(**ROWS)):
        with pytest.raises(CheckpointError, match=name):
            step.run(model, calibrated_context(tmp_path))


def test_matrices_that_are_quantized_again_meet_floats_again(tmp_path: Path) -> None:
    model = SmoothQuant().run(random_working_model(LLAMA_CONFIG), calibrated_context(tmp_path))
    assert len(model.int8_activations) == 21
    for step in (Rtn(**ROWS), Gptq(**ROWS), Awq(**ROWS)):
        assert not step.run(model, calibrated_context(tmp_path)).int8_activations


def test_fewer_tokens_than_columns_are_noted(tmp_path: Path) -> None:
    context = calibrated_context(tmp_path, calibration=ragged_sequences()[:1])
    Gptq(**ROWS).run(random_working_model(LLAMA_CONFIG), context)
    assert "fewer than the 40 columns of model.layers.0.mlp.down_proj.weight" in context.notes[0]


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq"])
def test_recipes_name_the_steps(name: str) -> None:
    recipe = parse_recipe(
        {"steps": [{name: {"bits": 3, "group_size": 128, "targets": {"tables": True}}}]}, name="r"
    )
    step: Any = recipe.steps[0].step
    assert (step.bits, step.group_size, step.targets.tables) == (3, 128, True)
