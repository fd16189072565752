"""A walk sees what a model's matrices multiply with, and the model sees what a walk changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.working_models import TINY, calibrated_context, ragged_sequences, random_working_model
from decoder_configs import DECODERS
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress import batch_state
from fastserve.compress.calibration import visit, walk
from fastserve.compress.station import Station
from fastserve.compress.step import LayerError, WorkingModel
from fastserve.errors import CheckpointError, DataError
from fastserve.types import Float32Array
from parity import compile_graph, run_embeddings, run_logits, store_f32
from tiny_models import LLAMA_CONFIG, tiny_graph


class Recorder:
    """Keeps all that it is shown; changes a matrix to what `changes` says. Fails at station `fails_at`."""

    def __init__(
        self, changes: Mapping[str, Float32Array] | None = None, *, fails_at: int | None = None
    ) -> None:
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.names: list[tuple[str, ...]] = []
        self.changes = changes or {}
        self.fails_at = fails_at
        self.context = None

    @property
    def key(self) -> str:
        return "recorder"

    def observe(self, station: Station, x: torch.Tensor) -> None:
        if station.index == self.fails_at:
            raise KeyboardInterrupt
        self.seen.setdefault(station.index, []).append(x.clone())

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        self.names.append(station.names)
        if self.context is not None:
            self.context.layers.append(LayerError(station.names[0], "recorder", 0.0, "outputs"))
        return store_f32({name: self.changes[name] for name in station.names if name in self.changes})

    def rows(self, index: int) -> torch.Tensor:
        return torch.cat(self.seen[index])


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.compress.calibration.BATCH_TOKENS", 64)


def parameters_of(model: WorkingModel) -> dict[str, Float32Array]:
    return {name: to_f32(tensor) for name, tensor in model.tensors.items()}


def model_logits(model: WorkingModel) -> Float32Array:
    executable = compile_graph("torch", tiny_graph(dict(model.config)), parameters_of(model))
    return np.concatenate([run_logits(executable, sequence) for sequence in ragged_sequences()])


def head_logits(model: WorkingModel, recorder: Recorder) -> Float32Array:
    rows = recorder.rows(max(recorder.seen)).numpy()
    return np.asarray(rows @ parameters_of(model)["lm_head.weight"].T)


def test_a_walk_that_changes_nothing_comes_to_the_logits_of_the_model(tmp_path: Path) -> None:
    model, recorder = random_working_model(TINY["llama"]), Recorder()
    walked = walk(model, calibrated_context(tmp_path), recorder)
    assert len(recorder.seen[0]) > 1  # several batches
    np.testing.assert_allclose(head_logits(model, recorder), model_logits(model), atol=2e-5)
    assert all(walked.tensors[name] is model.tensors[name] for name in model.tensors)


def test_stations_are_the_linears_that_read_one_value_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    walk(random_working_model(TINY["llama"]), calibrated_context(tmp_path), recorder)
    layer = "model.layers.0."
    assert recorder.names[:4] == [
        tuple(f"{layer}self_attn.{part}_proj.weight" for part in "qkv"),
        (f"{layer}self_attn.o_proj.weight",),
        (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
        (f"{layer}mlp.down_proj.weight",),
    ]
    assert recorder.names[-1] == ("lm_head.weight",)
    assert len(recorder.names) == 13


def test_an_encoder_is_walked_to_its_last_matrix(tmp_path: Path) -> None:
    model, recorder = random_working_model(TINY["bert"]), Recorder()
    walk(model, calibrated_context(tmp_path), recorder)
    parameters = parameters_of(model)
    executable = compile_graph("torch", tiny_graph(TINY["bert"]), parameters, max_context=128)
    expected = np.concatenate([run_embeddings(executable, [s]) for s in ragged_sequences()])
    assert recorder.names[-2:] == [
        ("encoder.layer.2.intermediate.dense.weight",),
        ("encoder.layer.2.output.dense.weight",),
    ]
    before, hidden = recorder.rows(10), recorder.rows(11)  # [rows, hidden_size], [rows, intermediate_size]
    output = "encoder.layer.2.output."
    dense, norm = (
        [torch.from_numpy(parameters[f"{output}{module}.{part}"]) for part in ("weight", "bias")]
        for module in ("dense", "LayerNorm")
    )
    projected = torch.nn.functional.linear(hidden, *dense)
    vectors = torch.nn.functional.layer_norm(projected + before, (24,), *norm, 1e-12)
    means = [part.mean(0).numpy() for part in vectors.split([len(s) for s in ragged_sequences()])]
    np.testing.assert_allclose(np.stack(means), expected, atol=2e-5)


def test_what_comes_after_a_station_sees_what_it_changed(tmp_path: Path) -> None:
    model = random_working_model(TINY["llama"])
    name = "model.layers.1.mlp.up_proj.weight"
    halved = np.asarray(parameters_of(model)[name] / 2, np.float32)
    recorder = Recorder({name: halved})
    changed = walk(model, calibrated_context(tmp_path), recorder)
    np.testing.assert_array_equal(to_f32(changed.tensors[name]), halved)
    np.testing.assert_allclose(head_logits(changed, recorder), model_logits(changed), atol=2e-5)
    assert np.abs(model_logits(changed) - model_logits(model)).max() > 1e-2


def test_states_on_disk_give_the_same_bits(tmp_path: Path) -> None:
    model = random_working_model(TINY["llama"])
    recorders = {}
    for state_bytes in (0, 20_000, 2**30):
        recorders[state_bytes] = Recorder()
        context = calibrated_context(tmp_path / str(state_bytes))
        visit(model, context, recorders[state_bytes], state_bytes=state_bytes)
        assert not list(context.scratch.rglob("states/*"))  # read and removed
    whole = recorders[2**30]
    for recorder in recorders.values():
        for index in whole.seen:
            assert torch.equal(recorder.rows(index), whole.rows(index))


@pytest.mark.parametrize("fails_at", [0, 1, 6, 12])
def test_a_walk_that_was_interrupted_goes_on_as_one_that_was_not(fails_at: int, tmp_path: Path) -> None:
    model = random_working_model(TINY["llama"])
    changes = {
        name: np.asarray(value * 0.9, np.float32)
        for name, value in parameters_of(model).items()
        if "proj" in name
    }
    whole, first, second = Recorder(changes), Recorder(changes, fails_at=fails_at), Recorder(changes)
    expected = walk(model, calibrated_context(tmp_path / "whole"), whole)
    first.context = calibrated_context(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        walk(model, first.context, first)
    second.context = calibrated_context(tmp_path / "resumed")
    resumed = walk(model, second.context, second)
    assert set(second.seen) == set(range(fails_at, 13))  # what was done is not done again
    for index in second.seen:
        assert torch.equal(second.rows(index), whole.rows(index))
    for name, tensor in expected.tensors.items():
        assert np.array_equal(to_f32(tensor), to_f32(resumed.tensors[name]))
    assert [layer.name for layer in second.context.layers] == [names[0] for names in whole.names]


def test_another_model_or_calibration_is_walked_anew(tmp_path: Path) -> None:
    model = random_working_model(TINY["llama"])
    walk(model, calibrated_context(tmp_path), Recorder())
    again, other_text, other_model = Recorder(), Recorder(), Recorder()
    walk(model, calibrated_context(tmp_path), again)
    walk(model, calibrated_context(tmp_path, calibration=ragged_sequences(seed=4)), other_text)
    norm = "model.layers.0.input_layernorm.weight"
    changed = store_f32({norm: np.ones(24, np.float32)})
    walk(model.with_tensors(changed), calibrated_context(tmp_path), other_model)
    assert not again.seen
    assert len(other_text.seen) == len(other_model.seen) == 13


def test_only_the_stations_of_named_matrices_are_visited(tmp_path: Path) -> None:
    recorder = Recorder()
    name = "model.layers.1.mlp.down_proj.weight"
    walk(random_working_model(TINY["llama"]), calibrated_context(tmp_path), recorder, names=[name])
    assert recorder.names == [(name,)]


def test_a_head_that_is_the_embedding_is_a_station(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "tie_word_embeddings": True}
    recorder = Recorder()
    walk(random_working_model(config), calibrated_context(tmp_path), recorder)
    assert recorder.names[-1] == ("model.embed_tokens.weight",)


def test_matrices_of_experts_are_left_as_they_are_which_is_noted(tmp_path: Path) -> None:
    recorder, context = Recorder(), calibrated_context(tmp_path)
    walk(random_working_model(DECODERS["qwen2_moe"]), context, recorder)
    names = [name for station in recorder.names for name in station]
    assert any("shared_expert.down_proj" in name for name in names)
    assert not any(".experts." in name for name in names)
    assert context.notes == ["matrices of experts are not calibrated: they are left as they are"]


def test_numbers_that_are_not_finite_are_told_by_name(tmp_path: Path) -> None:
    model = random_working_model(TINY["llama"])
    name = "model.layers.1.mlp.up_proj.weight"
    broken = parameters_of(model)[name].copy()
    broken[3, 4] = np.nan
    with pytest.raises(CheckpointError, match=rf"{name} has 1 numbers of 960 that are NaN"):
        walk(model.with_tensors(store_f32({name: broken})), calibrated_context(tmp_path), Recorder())


def test_no_calibration_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no calibration text"):
        walk(random_working_model(TINY["llama"]), calibrated_context(tmp_path, calibration=()), Recorder())


def test_batches_hold_whole_sequences_in_order() -> None:
    sequences = ragged_sequences(20)
    batches = batch_state.make_batches(sequences, num_tokens=64)
    assert [length for batch in batches for length in batch.lengths] == [len(s) for s in sequences]
    assert torch.cat([batch.token_ids for batch in batches]).tolist() == [i for s in sequences for i in s]
    assert all(len(batch.token_ids) <= 64 for batch in batches)
