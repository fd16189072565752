from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from compress.working_models import TINY, ragged_sequences, random_working_model, working_model
from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.compress.batch_state import make_batches, run_nodes
from fastserve.compress.calibration import graph_of
from fastserve.compress.quantize import rounded_inputs, w8a8
from fastserve.compress.quantize.fold import with_short_vectors
from fastserve.compress.quantize.rounded_inputs import measure_losses, round_tokens
from fastserve.compress.quantize.smoothquant import SmoothQuant
from fastserve.compress.quantize.w8a8 import prepare_w8a8
from fastserve.compress.station import Station, find_stations
from fastserve.compress.step import Context, Targets, WorkingModel
from fastserve.graph.node import Value
from fastserve.models.matrices import find_matrices
from parity import store_f32
from tiny_models import random_parameters, tiny_graph

SEQUENCES = ragged_sequences(12)
OUTLIER = "model.layers.1.mlp.up_proj.weight"
MEETS_IT = "model.layers.1.mlp.down_proj.weight"


def run(model: WorkingModel, rounded: Station | None = None) -> torch.Tensor:
    """What a model gives, the inputs of one station rounded: log probabilities, or embeddings."""
    graph = graph_of(model)
    weights = rounded_inputs._weights(model, graph)
    rows = []
    for batch in make_batches(SEQUENCES, num_tokens=1):
        values: dict[Value, torch.Tensor] = {}
        position = 0
        with torch.no_grad():
            if rounded is not None:
                position = rounded.position
                run_nodes(graph, 0, position, batch, weights, values)
                values[rounded.x] = round_tokens(values[rounded.x])
            run_nodes(graph, position, len(graph.nodes), batch, weights, values)
        (value,) = graph.outputs.values()
        rows.append(values[value].double())
    outputs = torch.cat(rows)
    return outputs.log_softmax(1) if "logits" in graph.outputs else outputs


def loss(expected: torch.Tensor, actual: torch.Tensor, *, of_logits: bool) -> float:
    if of_logits:
        return float((expected.exp() * (expected - actual)).sum(1).mean())
    return float(((expected - actual).square().sum(1) / expected.square().sum(1)).mean())


@pytest.mark.parametrize("name", TINY)
def test_losses_are_those_that_rounding_has(name: str) -> None:
    model = random_working_model(TINY[name])
    names = find_matrices(model.checkpoint).linears
    expected = run(model)
    measured: dict[tuple[str, ...], float] = {}
    for seed in range(8):
        for station, value in measure_losses(model, names, SEQUENCES, seed=seed).items():
            measured[station] = measured.get(station, 0.0) + value / 8
    stations = find_stations(graph_of(model), names)
    assert measured.keys() == {station.names for station in stations}
    for station in stations:
        actual = loss(expected, run(model, station), of_logits=name == "llama")
        assert 0.5 < measured[station.names] / actual < 2.0, station.names


def with_outlier() -> WorkingModel:
    """A channel of one layer's inputs that is a hundred times the others."""
    parameters = random_parameters(tiny_graph(TINY["llama"]))
    parameters[OUTLIER][3] *= 100
    parameters[MEETS_IT][:, 3] /= 100
    return working_model(TINY["llama"], parameters)


def prepare(model: WorkingModel, **options: float) -> w8a8.Prepared:
    return prepare_w8a8(model.checkpoint, SEQUENCES, **options)


def test_only_what_meets_an_outlier_is_left_alone() -> None:
    most_loss = prepare(with_outlier(), most_loss=1.0).loss_of_all / 2
    prepared = prepare(with_outlier(), most_loss=most_loss)
    assert prepared.float_activations == {MEETS_IT}
    assert prepared.loss <= most_loss


def test_nothing_is_left_alone_where_little_is_lost_and_all_where_nothing_may_be() -> None:
    model = random_working_model(TINY["llama"])
    assert not prepare(model, most_loss=1.0).float_activations
    everything = prepare(model, most_loss=0.0).float_activations
    assert everything == set(find_matrices(model.checkpoint).linears)


def test_the_step_leaves_the_same_ones_alone_and_says_so(tmp_path: Path) -> None:
    most_loss = prepare(with_outlier(), most_loss=1.0).loss_of_all / 2
    context = Context(source=tmp_path, scratch=tmp_path, calibration=SEQUENCES)
    stepped = SmoothQuant(alpha=w8a8.ALPHA, most_loss=most_loss).run(with_outlier(), context)
    linears = set(find_matrices(stepped.checkpoint).linears)
    assert stepped.int8_activations == linears - {MEETS_IT}
    assert all(isinstance(stepped.tensors[name], GroupedTensor) for name in linears)
    said = f"smoothquant: 1 of {len(linears)} matrices meet activations as they are"
    assert any(note.startswith(said) for note in context.notes)


@pytest.mark.parametrize("most_loss", [None, 0.0])
def test_tables_that_are_looked_up_meet_no_activations(tmp_path: Path, most_loss: float | None) -> None:
    context = Context(source=tmp_path, scratch=tmp_path, calibration=SEQUENCES)
    step = SmoothQuant(most_loss=most_loss, targets=Targets(linears=False, tables=True))
    stepped = step.run(random_working_model(TINY["bert"]), context)
    assert not stepped.int8_activations
    assert any(isinstance(tensor, GroupedTensor) for tensor in stepped.tensors.values())


def test_only_norms_become_short() -> None:
    parameters = random_parameters(tiny_graph(TINY["bert"]))
    short = {name: torch.from_numpy(v).bfloat16().float().numpy() for name, v in parameters.items()}
    model = with_short_vectors(working_model(TINY["bert"], short))
    formats = {name: t.format.value for name, t in model.tensors.items() if len(t.shape) == 1}
    assert {formats[name] for name in formats if name.endswith(".bias")} == {"f32"}
    assert {formats[name] for name in formats if name.endswith("LayerNorm.weight")} == {"bf16"}


def test_the_function_is_that_of_the_model() -> None:
    model = with_outlier()
    prepared = WorkingModel(checkpoint=prepare(model).checkpoint)
    assert loss(run(model), run(prepared), of_logits=True) < 1e-9
    changed = [
        name
        for name, tensor in prepared.tensors.items()
        if not np.array_equal(tensor.data, model.tensors[name].data)
    ]
    assert any("norm" in name for name in changed)


def test_norms_that_are_numbers_of_bfloat16_stay_so() -> None:
    """As others load them: scales that are divided by are those that rounded norms stand for."""
    parameters = random_parameters(tiny_graph(TINY["llama"]))
    for name, values in parameters.items():
        if values.ndim == 1:
            parameters[name] = torch.from_numpy(values).bfloat16().float().numpy()
    model = working_model(TINY["llama"], parameters)
    prepared = prepare(model).checkpoint
    norms = {name: t for name, t in prepared.tensors.items() if len(t.shape) == 1}
    assert {tensor.format.value for tensor in norms.values()} == {"bf16"}
    assert loss(run(model), run(WorkingModel(checkpoint=prepared)), of_logits=True) < 1e-9


def test_tokens_are_rounded_as_by_compressed_tensors() -> None:
    x = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-3, 3, 7)[:, None]
    arguments = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Linear(40, 8))
    theirs = fake_quantize(x, scale, zero, arguments)
    torch.testing.assert_close(round_tokens(x), theirs, rtol=1e-6, atol=1e-9)


def test_random_tokens_stand_for_texts_of_an_encoder(tmp_path: Path) -> None:
    config = TINY["bert"]
    checkpoint = Checkpoint(
        path=tmp_path,
        format="safetensors",
        config=config,
        tensors=store_f32(random_parameters(tiny_graph(config))),
        eos_token_ids=(),
        chat_template=None,
        sentence=None,
        metadata=None,
    )
    texts = w8a8.sample_texts(tmp_path, checkpoint, num_sequences=3, length=20)
    assert [len(text) for text in texts] == [20, 20, 20]
    assert all(0 <= token_id < config["vocab_size"] for text in texts for token_id in text)
    assert texts == w8a8.sample_texts(tmp_path, checkpoint, num_sequences=3, length=20)
    prepared = prepare_w8a8(checkpoint, texts)
    assert 0 <= prepared.loss <= prepared.loss_of_all
