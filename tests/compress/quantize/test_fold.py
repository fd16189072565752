"""A model whose scales are folded computes what it did."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.working_models import random_working_model
from decoder_configs import DECODERS
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.compress.calibration import graph_of
from fastserve.compress.quantize.fold import Factors, find_fold, float_tensor, fold_vectors
from fastserve.compress.station import find_stations
from fastserve.compress.step import Targets, WorkingModel
from fastserve.types import Float32Array
from parity import compile_graph, run_embeddings, run_logits
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, tiny_graph

CONFIGS = {
    "llama": LLAMA_CONFIG,
    "bert": BERT_CONFIG,
    **{name: DECODERS[name] for name in ("phi3", "gemma", "opt")},
}
# Of each layer: before q/k/v, before o, before the MLP, before its last matrix; a head that is not tied.
NUM_FOLDS = {"llama": 13, "phi3": 13, "gemma": 12, "opt": 12, "bert": 3}

IDS = np.random.default_rng(0).integers(0, 97, 30).tolist()


def outputs(model: WorkingModel) -> Float32Array:
    config = dict(model.config)
    parameters = {name: to_f32(tensor) for name, tensor in model.tensors.items()}
    executable = compile_graph("torch", tiny_graph(config), parameters, max_context=128)
    if config["model_type"] == "bert":
        return run_embeddings(executable, [IDS])
    return run_logits(executable, IDS)


def fold_all(model: WorkingModel) -> tuple[WorkingModel, int]:
    """With random scales at every station that takes them; and how many do."""
    changed: dict[str, StoredTensor] = {}
    factors, num_folds = Factors(), 0
    generator = torch.Generator().manual_seed(0)
    for station in find_stations(graph_of(model), model.matrices(Targets(tables=True))):
        fold = find_fold(station)
        if fold is None:
            continue
        num_folds += 1
        scales = torch.rand(fold.num_scales, generator=generator) * 3 + 0.3
        vectors, scales = fold_vectors(model, fold, scales)
        changed |= vectors
        factors.add(station, fold, scales)
    for name in factors.names:
        values = torch.from_numpy(to_f32(model.tensors[name]))
        changed[name] = float_tensor(name, factors.apply(name, values))
    return model.with_tensors(changed), num_folds


@pytest.mark.parametrize("family", CONFIGS)
def test_the_model_computes_what_it_did(family: str) -> None:
    model = random_working_model(CONFIGS[family])
    folded, num_folds = fold_all(model)
    assert num_folds == NUM_FOLDS[family]
    expected = outputs(model)
    np.testing.assert_allclose(outputs(folded), expected, atol=2e-5 * np.ptp(expected))


def test_norms_in_bf16_cost_nothing_more() -> None:
    model = random_working_model(LLAMA_CONFIG)
    norms = {
        name: StoredTensor(name, TensorFormat.BF16, t.shape, t.data.reshape(-1, 4)[:, 2:].reshape(-1).copy())
        for name, t in model.tensors.items()
        if name.endswith("norm.weight")
    }
    model = model.with_tensors(norms)
    folded, _ = fold_all(model)
    assert all(folded.tensors[name].format is TensorFormat.BF16 for name in norms)
    expected = outputs(model)
    np.testing.assert_allclose(outputs(folded), expected, atol=2e-5 * np.ptp(expected))
