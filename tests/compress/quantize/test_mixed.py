"""Bits go where they are worth most: choices against all others, sensitivities against real divergences."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from compress.working_models import TINY, calibrated_context, ragged_sequences, random_working_model
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.quantize.grid import Grid, quantize
from fastserve.compress.quantize.mixed import Mixed, Option, choose_bits, stacked_units, stored_bits
from fastserve.compress.quantize.sensitivity import measure_sensitivity
from fastserve.compress.quantize.step import read_matrix
from fastserve.compress.step import Targets, WorkingModel
from fastserve.errors import DataError, OptionError
from fastserve.evaluate.language_model import kl_divergence, log_softmax
from fastserve.types import Float32Array
from parity import compile_graph, run_embeddings, run_logits
from tiny_models import tiny_graph


def outputs(model: WorkingModel) -> Float32Array:
    parameters = {name: to_f32(tensor) for name, tensor in model.tensors.items()}
    executable = compile_graph("torch", tiny_graph(dict(model.config)), parameters, max_context=128)
    if model.config["model_type"] == "bert":
        return np.concatenate([run_embeddings(executable, [s]) for s in ragged_sequences(40)])
    return np.concatenate([run_logits(executable, s) for s in ragged_sequences(40)])


@pytest.mark.parametrize("kind", TINY)
def test_sensitivities_are_what_rounding_a_matrix_costs(kind: str) -> None:
    model = random_working_model(TINY[kind])
    part = "mlp.up_proj" if kind == "llama" else "intermediate.dense"
    names = [name for name in model.tensors if name.endswith(f"{part}.weight")]
    assert len(names) == 3
    grids = {bits: Grid(bits=bits, granularity="channel") for bits in (4, 3)}
    rounded = {
        name: {bits: quantize(name, read_matrix(model, name), grid) for bits, grid in grids.items()}
        for name in names
    }
    found = measure_sensitivity(model, rounded, ragged_sequences(40))
    expected = outputs(model)
    for name, bits in product(names, (4, 3)):
        changed = outputs(model.with_tensors({name: rounded[name][bits]}))
        if kind == "llama":
            cost = kl_divergence(log_softmax(expected), log_softmax(changed)).mean()
        else:
            cost = (np.square(changed - expected).sum(1) / np.square(expected).sum(1)).mean()
        assert 0.5 < found[name][bits] / cost < 2


def test_a_choice_is_the_best_of_all_of_its_size() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        options = [
            {bits: Option(bits * 10, float(loss)) for bits, loss in zip((2, 3, 4), losses, strict=True)}
            for losses in np.sort(rng.random((5, 3)) ** 3, axis=1)[:, ::-1]
        ]
        for most in (100, 130, 170, 210):
            chosen = choose_bits(options, most)
            size = sum(option[b].num_bits for option, b in zip(options, chosen, strict=True))
            loss = sum(option[b].loss for option, b in zip(options, chosen, strict=True))
            assert size <= most
            others = product((2, 3, 4), repeat=5)
            least = min(
                sum(option[b].loss for option, b in zip(options, other, strict=True))
                for other in others
                if 10 * sum(other) <= size
            )
            is_convex = all(o[2].loss - o[3].loss >= o[3].loss - o[4].loss for o in options)
            assert loss <= least + 1e-12 if is_convex else loss <= least * 1.5 + 0.1


def test_options_that_lose_more_for_more_bits_are_never_taken() -> None:
    options = [{2: Option(2, 1.0), 3: Option(3, 2.0), 4: Option(4, 0.5)}]
    assert choose_bits(options, 3) == [2]
    assert choose_bits(options, 4) == [4]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_model_keeps_within_its_bits_and_stacked_matrices_have_the_same(
    method: str, tmp_path: Path
) -> None:
    model, context = random_working_model(TINY["llama"]), calibrated_context(tmp_path)
    step = Mixed(bits_per_weight=4.5, misfit="channel", method=method, num_sequences=4)  # type: ignore[arg-type]
    mixed = step.run(model, context)
    names = model.matrices(Targets())
    tensors = [mixed.tensors[name] for name in names]
    grouped = [tensor for tensor in tensors if isinstance(tensor, GroupedTensor)]
    assert len(grouped) == len(names)
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in grouped)
    assert 4.2 < sum(map(stored_bits, grouped)) / weights <= 4.5
    assert len({tensor.bits for tensor in grouped}) > 1
    of_name = dict(zip(names, grouped, strict=True))
    units = stacked_units(model, names)
    assert [len(unit) for unit in units[:4]] == [3, 1, 2, 1]
    assert all(len({of_name[name].bits for name in unit}) == 1 for unit in units)
    assert context.notes[-1].startswith("mixed: of the weights have ")


def test_too_few_bits_and_no_text_are_errors(tmp_path: Path) -> None:
    model = random_working_model(TINY["llama"])
    with pytest.raises(OptionError, match="bits_per_weight is too small"):
        Mixed(bits_per_weight=2.5, choices=(3, 4), misfit="channel", num_sequences=1).run(
            model, calibrated_context(tmp_path)
        )
    with pytest.raises(DataError, match="no calibration text"):
        Mixed().run(model, calibrated_context(tmp_path, calibration=()))
    with pytest.raises(OptionError, match="leaves nothing to choose"):
        Mixed(choices=(4,))
