"""Neurons, heads and layers taken out of tiny models, judged by `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from compress.working_models import all_values, make_context, random_sequences, working_model
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.compress.prune.heads import missing_heads, with_all_heads, without_last_heads
from fastserve.compress.prune.influence import layer_influence
from fastserve.compress.prune.refit import fit_columns
from fastserve.compress.prune.structure import find_structure
from fastserve.compress.prune.structured import Structured
from fastserve.compress.prune.unit_score import unit_norms
from fastserve.compress.step import WorkingModel
from fastserve.errors import CheckpointError, DataError, OptionError, UnsupportedError
from fastserve.models.config import DecoderConfig
from fastserve.models.family import build_graph, read_config
from fastserve.models.parameters import check_parameters
from parity import BACKENDS, RANGE_BOUND, compile_graph, range_error, run_embeddings, run_logits
from stored_tensors import random_grouped
from tiny_encoders import ENCODERS, hf_encoder
from tiny_models import (
    BERT_CONFIG,
    LLAMA_CONFIG,
    hf_model,
    hf_parameters,
    random_language_model,
    random_parameters,
    tiny_graph,
)

SEQUENCES = random_sequences(97, 6, 20)
TEXT = SEQUENCES[0]


def outputs_of(model: WorkingModel, ids: list[int] = TEXT, *, backend: str = "torch") -> np.ndarray:
    """Logits [tokens, vocabulary] of a decoder; of an encoder the mean of its token vectors."""
    config = read_config(model.config)
    graph = build_graph(config, model.tensors)
    check_parameters(graph, model.tensors)
    executable = compile_graph(backend, graph, all_values(model), max_context=96)
    if isinstance(config, DecoderConfig):
        return np.asarray(run_logits(executable, ids))
    return np.asarray(run_embeddings(executable, [ids])[0])


def outputs_of_transformers(model: WorkingModel, folder: Path, ids: list[int] = TEXT) -> np.ndarray:
    """The same, by `transformers`, which opens the model from a folder; no tensor is missing or left over."""
    from transformers import AutoModel, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config))
    save_file(all_values(model), folder / "model.safetensors", metadata={"format": "pt"})
    is_decoder = isinstance(read_config(model.config), DecoderConfig)
    kind = AutoModelForCausalLM if is_decoder else AutoModel
    options = {} if is_decoder or model.config["model_type"] == "distilbert" else {"add_pooling_layer": False}
    network, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        output = network.eval()(torch.tensor([ids]))
    if is_decoder:
        return np.asarray(output.logits[0].numpy())
    return np.asarray(output.last_hidden_state[0].mean(dim=0).numpy())


DECODERS: dict[str, dict[str, Any]] = {
    "llama, grouped queries": LLAMA_CONFIG,
    "llama, biases, tied": {
        **LLAMA_CONFIG, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True
    },
    "qwen3": {
        **LLAMA_CONFIG, "model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 3
    },
    "gemma2": {
        **LLAMA_CONFIG,
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 8,
    },
}  # fmt: skip
SMALL_ENCODERS = {name: ENCODERS[name] for name in ("bert", "roberta", "mpnet", "distilbert")}


def decoder(config: dict[str, Any]) -> WorkingModel:
    config = {
        key: value for key, value in config.items() if key != "hidden_act" or "gemma" not in str(config)
    }
    network = random_language_model(config)
    weights = hf_parameters(network)
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    return working_model({**config, "architectures": [type(network).__name__]}, weights)


def encoder(config: dict[str, Any]) -> WorkingModel:
    return working_model(config, hf_parameters(hf_encoder(config)))


@pytest.mark.parametrize("name", DECODERS)
def test_a_smaller_decoder_is_an_ordinary_one_of_transformers(name: str, tmp_path: Path) -> None:
    model, context = decoder(DECODERS[name]), make_context(tmp_path, calibration=SEQUENCES)
    small = Structured(neurons=0.4, heads=0.3, layers=1, multiple=4).run(model, context)
    config = small.config
    kv_heads = model.config["num_key_value_heads"] - 1
    assert (config["intermediate_size"], config["num_hidden_layers"]) == (24, 2)
    assert (config["num_key_value_heads"], config["num_attention_heads"]) == (kv_heads, 2 * kv_heads)
    assert config["head_dim"] == 6
    expected = outputs_of_transformers(small, tmp_path / "small")
    for backend in BACKENDS:
        assert range_error(outputs_of(small, backend=backend), expected) < RANGE_BOUND
    assert all(small.tensors[key].name == key for key in small.tensors)


@pytest.mark.parametrize("name", SMALL_ENCODERS)
def test_neurons_and_layers_of_encoders_go_and_transformers_opens_what_is_left(
    name: str, tmp_path: Path
) -> None:
    model, context = encoder(SMALL_ENCODERS[name]), make_context(tmp_path, calibration=SEQUENCES)
    small = Structured(neurons=0.5, layers=1, multiple=1).run(model, context)
    expected = outputs_of_transformers(small, tmp_path / "small")
    for backend in BACKENDS:
        assert range_error(outputs_of(small, backend=backend), expected) < RANGE_BOUND


@pytest.mark.parametrize("name", SMALL_ENCODERS)
def test_encoders_lose_heads_by_a_key_of_ours_and_transformers_opens_them_with_zeros_in_their_place(
    name: str, tmp_path: Path
) -> None:
    model, context = encoder(SMALL_ENCODERS[name]), make_context(tmp_path, calibration=SEQUENCES)
    small = Structured(heads=0.5, neurons=0.2, multiple=1).run(model, context)
    assert small.config["head_dim"] == 6
    assert "no head_dim" in context.notes[-1]
    assert missing_heads(small) == 2
    padded = with_all_heads(small)
    expected = outputs_of_transformers(padded, tmp_path / "padded")
    for backend in BACKENDS:
        assert range_error(outputs_of(small, backend=backend), expected) < RANGE_BOUND
    again = without_last_heads(padded, 2)
    assert again.config == small.config
    assert all((values == all_values(small)[key]).all() for key, values in all_values(again).items())
    with pytest.raises((ValueError, RuntimeError)):
        outputs_of_transformers(small, tmp_path / "small")


@pytest.mark.parametrize("make", [lambda: decoder(LLAMA_CONFIG), lambda: encoder(BERT_CONFIG)])
def test_units_that_give_nothing_go_first_and_are_not_missed(make: Any, tmp_path: Path) -> None:
    model = make()
    structure = find_structure(model)
    weights = all_values(model)
    rng = np.random.default_rng(0)
    for part in (*structure.attentions, *structure.feed_forwards):
        gone = rng.choice(part.num_units, part.num_units // 2, replace=False)
        columns = (gone[:, None] * part.width + np.arange(part.width)).ravel()
        weights[part.name][:, columns] = 0
    model = working_model(dict(model.config), weights)
    context = make_context(tmp_path, calibration=SEQUENCES)
    small = Structured(neurons=0.5, heads=0.5, multiple=1).run(model, context)
    assert range_error(outputs_of(small), outputs_of(model)) < RANGE_BOUND
    sizes = [sum(tensor.data.nbytes for tensor in m.tensors.values()) for m in (small, model)]
    assert sizes[0] < 0.75 * sizes[1]


def test_layers_that_add_nothing_go_and_the_rest_is_the_model_without_them(tmp_path: Path) -> None:
    model = decoder(LLAMA_CONFIG)
    weights = all_values(model)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{part}.weight"][:] = 0
    model = working_model(dict(model.config), weights)
    context = make_context(tmp_path, calibration=SEQUENCES)
    small = Structured(layers=1).run(model, context)
    assert small.config["num_hidden_layers"] == 2
    assert range_error(outputs_of(small), outputs_of(model)) < RANGE_BOUND
    assert "layers 1 went" in context.notes[0]
    assert (
        all_values(small)["model.layers.1.mlp.up_proj.weight"] == weights["model.layers.2.mlp.up_proj.weight"]
    ).all()


@pytest.mark.parametrize("config", [LLAMA_CONFIG, BERT_CONFIG], ids=["llama", "bert"])
def test_a_layer_s_influence_is_what_the_hidden_states_of_transformers_say(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model, context = working_model(config), make_context(tmp_path, calibration=SEQUENCES)
    found = layer_influence(model, context, find_structure(model))
    network = hf_model(config)
    seen: list[torch.Tensor] = []
    layers = network.model.layers if config is LLAMA_CONFIG else network.encoder.layer
    for layer in layers:
        layer.register_forward_hook(
            lambda _, args, output: seen.append(
                torch.cosine_similarity(args[0], output[0] if isinstance(output, tuple) else output, dim=-1)
            )
        )
    with torch.no_grad():
        network(torch.tensor(SEQUENCES))
    expected = [float(1 - cosines.mean()) for cosines in seen]
    assert found == pytest.approx(expected, rel=1e-3)


def test_scores_are_the_norms_of_what_units_add() -> None:
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=(5, 12)).astype(np.float32), rng.normal(size=(30, 12)).astype(np.float32)
    found = unit_norms(torch.from_numpy(weights), torch.from_numpy(x.T @ x), 3)
    expected = [np.linalg.norm(x[:, u : u + 3] @ weights[:, u : u + 3].T) for u in range(0, 12, 3)]
    assert found == pytest.approx(np.asarray(expected), rel=1e-4)


def test_columns_that_stay_are_the_least_squares_solution() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 6))
    x = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    found = fit_columns(
        torch.from_numpy(weights.astype(np.float32)), torch.from_numpy(x.T @ x), torch.tensor([0, 2, 5])
    ).numpy()
    best = np.linalg.lstsq(x[:, [0, 2, 5]], x @ weights.T, rcond=None)[0].T
    lost = [
        np.square(x @ (w - weights).T).sum() for w in (found, spread(best), spread(weights[:, [0, 2, 5]]))
    ]
    assert not found[:, [1, 3, 4]].any()
    assert lost[1] <= lost[0] < 1.05 * lost[1] < lost[2]


def spread(kept: np.ndarray) -> np.ndarray:
    whole = np.zeros((3, 6))
    whole[:, [0, 2, 5]] = kept
    return whole


def test_a_refit_loses_less_than_cutting_alone(tmp_path: Path) -> None:
    model = working_model(BERT_CONFIG)
    context = make_context(tmp_path, calibration=random_sequences(97, 40, 24))
    expected = outputs_of(model)
    lost = {
        refit: range_error(
            outputs_of(Structured(neurons=0.5, heads=0.5, multiple=1, refit=refit).run(model, context)),
            expected,
        )
        for refit in (False, True)
    }
    assert lost[True] < 0.9 * lost[False]


def test_counts_are_at_least_the_share_and_multiples_are_kept(tmp_path: Path) -> None:
    model, context = working_model(BERT_CONFIG), make_context(tmp_path, calibration=SEQUENCES)
    small = Structured(neurons=0.3, heads=0.3, multiple=16, refit=False).run(model, context)
    assert (small.config["intermediate_size"], small.config["num_attention_heads"]) == (16, 2)


def test_the_units_that_go_are_each_layer_s_own_but_where_layers_share_a_bias(tmp_path: Path) -> None:
    model, context = encoder(ENCODERS["mpnet"]), make_context(tmp_path, calibration=SEQUENCES)
    small = Structured(heads=0.5, refit=False).run(model, context)
    structure = find_structure(model)
    before, after = all_values(model), all_values(small)
    kept = []
    for part in structure.attentions:
        columns = before[part.name].T.reshape(4, 6, -1)
        left = after[part.name].T.reshape(2, 6, -1)
        kept.append([int(np.flatnonzero([(c == unit).all() for c in columns])[0]) for unit in left])
    assert kept[0] == kept[1] == kept[2]
    assert structure.bias is not None
    assert (after[structure.bias] == before[structure.bias][:, kept[0]]).all()


def test_a_llama_keeps_a_number_of_heads_that_transformers_takes(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    model, context = decoder(config), make_context(tmp_path, calibration=SEQUENCES)
    small = Structured(heads=0.25).run(model, context)  # 6 heads do not divide 32 columns
    assert small.config["num_attention_heads"] == 4
    assert "2 of 4 heads of keys went" in context.notes[-1]
    expected = outputs_of_transformers(small, tmp_path / "small")
    assert range_error(outputs_of(small), expected) < RANGE_BOUND
    odd = {**config, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 32}
    with pytest.raises(OptionError, match="no number up to 3, of 3 that share keys"):
        Structured(heads=0.5).run(working_model(odd, random_parameters(tiny_graph(odd))), context)


def test_what_cannot_be_taken_out_is_refused_by_name(tmp_path: Path) -> None:
    context = make_context(tmp_path, calibration=SEQUENCES)
    with pytest.raises(UnsupportedError, match="structured pruning of a 'albert' model"):
        Structured(heads=0.5).run(encoder(ENCODERS["albert"]), context)
    with pytest.raises(OptionError, match="layers=3 is all"):
        Structured(layers=3).run(working_model(LLAMA_CONFIG), context)
    with pytest.raises(DataError, match="no calibration text"):
        Structured(neurons=0.5).run(working_model(LLAMA_CONFIG), make_context(tmp_path))
    with pytest.raises(OptionError, match="takes nothing out"):
        Structured()
    name = "model.layers.0.mlp.up_proj.weight"
    grouped = random_grouped(TensorFormat.BF16, (40, 24), bits=4, group_size=8, name=name)
    with pytest.raises(OptionError, match=r"structured comes before quantization: .*up_proj.weight is int4"):
        Structured(neurons=0.5).run(working_model(LLAMA_CONFIG).with_tensors({name: grouped}), context)
    config = {key: value for key, value in DECODERS["gemma2"].items() if key != "layer_types"}
    model = working_model(config, hf_parameters(random_language_model(config)))
    with pytest.raises(UnsupportedError, match="its config has no layer_types"):
        Structured(layers=1).run(model, context)


def test_a_config_whose_heads_do_not_share_the_width_needs_head_dim() -> None:
    with pytest.raises(CheckpointError, match="no multiple of num_attention_heads=5"):
        read_config({**BERT_CONFIG, "num_attention_heads": 5})
    assert read_config({**BERT_CONFIG, "num_attention_heads": 5, "head_dim": 6}).head_dim == 6
