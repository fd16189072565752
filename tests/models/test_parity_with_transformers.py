"""Tiny random models against `transformers`, and proof that the bound would show a mistake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastserve.graph.node import Activation, GatedActivation, Graph, LayerNorm, Node, RmsNorm
from fastserve.models.family import build_graph, read_config
from fastserve.models.pooling import Pooling
from fastserve.models.rope import read_rope
from fastserve.types import Float32Array
from parity import (
    BACKENDS,
    RANGE_BOUND,
    Run,
    compile_graph,
    range_error,
    run_embeddings,
    run_greedy,
    run_logits,
    step_together,
)
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, hf_model, hf_parameters, tiny_graph

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

F16_KV_BOUND = 1e-3

LLAMAS: dict[str, dict[str, Any]] = {
    "grouped queries": LLAMA_CONFIG,
    "tied, with biases": {
        **LLAMA_CONFIG,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3 rope": {
        **LLAMA_CONFIG,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "linear rope": {
        **LLAMA_CONFIG,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "odd widths, gelu": {
        **LLAMA_CONFIG,
        "hidden_size": 33,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "intermediate_size": 57,
        "vocab_size": 101,
        "hidden_act": "gelu",
    },
    "tanh gelu, every head its own": {
        **LLAMA_CONFIG,
        "num_key_value_heads": 4,
        "hidden_act": "gelu_pytorch_tanh",
    },
}

BERTS: dict[str, dict[str, Any]] = {
    "gelu": BERT_CONFIG,
    "relu": {**BERT_CONFIG, "hidden_act": "relu"},
    "odd widths, tanh gelu": {
        **BERT_CONFIG,
        "hidden_size": 33,
        "num_attention_heads": 3,
        "intermediate_size": 57,
        "hidden_act": "gelu_new",
    },
}

TEXTS = [list(range(5, 45)), [7], [3, 3, 96, 12, 50]]


def random_prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 97, length).tolist()


def hf_logits(model: Any, token_ids: list[int]) -> Float32Array:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor([token_ids])).logits[0].numpy())


def hf_token_vectors(model: Any, token_ids: list[int], token_types: list[int] | None = None) -> Float32Array:
    import torch

    types = None if token_types is None else torch.tensor([token_types])
    with torch.no_grad():
        output = model(torch.tensor([token_ids]), token_type_ids=types)
    return np.asarray(output.last_hidden_state[0].numpy())


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_logits_equal_those_of_transformers(backend: str, name: str) -> None:
    model, prompt = hf_model(LLAMAS[name]), random_prompt(100)
    executable = compile_graph(backend, tiny_graph(LLAMAS[name]), hf_parameters(model))
    expected = hf_logits(model, prompt)
    assert range_error(run_logits(executable, prompt), expected) < RANGE_BOUND


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_a_prompt_in_chunks_gives_the_same_logits(backend: str, chunk: int) -> None:
    model, prompt = hf_model(LLAMA_CONFIG), random_prompt(70)
    executable = compile_graph(backend, tiny_graph(LLAMA_CONFIG), hf_parameters(model))
    assert range_error(run_logits(executable, prompt, chunk=chunk), hf_logits(model, prompt)) < RANGE_BOUND


def test_prefill_and_decode_of_several_sequences_share_a_batch(backend: str) -> None:
    model = hf_model(LLAMA_CONFIG)
    executable = compile_graph(backend, tiny_graph(LLAMA_CONFIG), hf_parameters(model))
    prompts = [random_prompt(length) for length in (50, 33, 1)]
    runs = [Run(executable, place) for place in range(3)]
    logits: list[list[Float32Array]] = [[], [], []]
    for step in ({0: 31}, {0: 18, 1: 20}, {0: 1, 1: 13, 2: 1}):
        turns = [(runs[i], prompts[i][len(runs[i].token_ids) :][:count]) for i, count in step.items()]
        for i, rows in zip(step, step_together(turns), strict=True):
            logits[i].append(rows)
    for prompt, rows in zip(prompts, logits, strict=True):
        assert range_error(np.concatenate(rows), hf_logits(model, prompt)) < RANGE_BOUND


def test_greedy_tokens_equal_those_of_transformers(backend: str) -> None:
    import torch

    model, prompt = hf_model(LLAMA_CONFIG), random_prompt(9)
    executable = compile_graph(backend, tiny_graph(LLAMA_CONFIG), hf_parameters(model))
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert run_greedy(executable, prompt, 40) == expected[0, len(prompt) :].tolist()


def test_f16_keys_and_values_change_logits_within_their_own_bound(backend: str) -> None:
    model, prompt = hf_model(LLAMA_CONFIG), random_prompt(100)
    executable = compile_graph(backend, tiny_graph(LLAMA_CONFIG), hf_parameters(model), kv_dtype="f16")
    error = range_error(run_logits(executable, prompt), hf_logits(model, prompt))
    assert RANGE_BOUND < error < F16_KV_BOUND


@pytest.mark.parametrize("name", BERTS)
def test_bert_embeddings_equal_the_mean_that_transformers_gives(backend: str, name: str) -> None:
    model = hf_model(BERTS[name])
    executable = compile_graph(backend, tiny_graph(BERTS[name]), hf_parameters(model), max_context=128)
    expected = np.stack([hf_token_vectors(model, ids).mean(0) for ids in TEXTS])
    assert range_error(run_embeddings(executable, TEXTS), expected) < RANGE_BOUND


@pytest.mark.parametrize(("pooling", "row"), [(Pooling("first", True), 0), (Pooling("last", True), -1)])
def test_pooling_takes_the_row_it_names_and_normalizes(backend: str, pooling: Pooling, row: int) -> None:
    model = hf_model(BERT_CONFIG)
    graph = build_graph(read_config(BERT_CONFIG), ending=pooling)
    executable = compile_graph(backend, graph, hf_parameters(model), max_context=128)
    vectors = np.stack([hf_token_vectors(model, ids)[row] for ids in TEXTS])
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert range_error(run_embeddings(executable, TEXTS), expected) < RANGE_BOUND


def test_token_types_reach_a_bert(backend: str) -> None:
    model, types = hf_model(BERT_CONFIG), [0] * 20 + [1] * 20
    executable = compile_graph(backend, tiny_graph(BERT_CONFIG), hf_parameters(model), max_context=128)
    expected = hf_token_vectors(model, TEXTS[0], types).mean(0, keepdims=True)
    actual = run_embeddings(executable, TEXTS[:1], token_types=[types])
    assert range_error(actual, expected) < RANGE_BOUND
    assert range_error(run_embeddings(executable, TEXTS[:1]), expected) > RANGE_BOUND


# Mutations: what a plausible mistake changes must be more than the bound allows.


def with_eps_times_10(node: Node) -> Node:
    return replace(node, eps=10 * node.eps) if isinstance(node, RmsNorm | LayerNorm) else node


def with_other_gelu(node: Node) -> Node:
    if isinstance(node, Activation | GatedActivation):
        return replace(node, kind="gelu_tanh" if node.kind == "gelu" else "gelu")
    return node


def mutate(graph: Graph, change: Any) -> Graph:
    return Graph(tuple(change(node) for node in graph.nodes), graph.outputs)


def with_queries_one_position_late(parameters: dict[str, Float32Array]) -> dict[str, Float32Array]:
    """q_proj weights whose queries come out turned by one position more, as if by an off-by-one in rope.

    (Turning queries and keys alike would change nothing: rotary positions are relative.)
    """
    dim = LLAMA_CONFIG["head_dim"]
    angles = np.array(read_rope(LLAMA_CONFIG, dim).usual.inverse_frequencies)
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    turn = np.block([[cos, -sin], [sin, cos]])

    def turned(name: str, weight: Float32Array) -> Float32Array:
        if not name.endswith("q_proj.weight"):
            return weight
        heads = weight.reshape(-1, dim, weight.shape[1])
        return (turn @ heads).reshape(weight.shape).astype(np.float32)

    return {name: turned(name, weight) for name, weight in parameters.items()}


@pytest.mark.parametrize("change", [with_eps_times_10, with_other_gelu])
def test_a_wrong_eps_or_gelu_in_a_llama_exceeds_the_bound(backend: str, change: Any) -> None:
    config = {**LLAMA_CONFIG, "hidden_act": "gelu"}
    model, prompt = hf_model(config), random_prompt(20)
    executable = compile_graph(backend, mutate(tiny_graph(config), change), hf_parameters(model))
    assert range_error(run_logits(executable, prompt), hf_logits(model, prompt)) > RANGE_BOUND


def test_rope_off_by_one_position_exceeds_the_bound(backend: str) -> None:
    model, prompt = hf_model(LLAMA_CONFIG), random_prompt(20)
    parameters = with_queries_one_position_late(hf_parameters(model))
    executable = compile_graph(backend, tiny_graph(LLAMA_CONFIG), parameters)
    assert range_error(run_logits(executable, prompt), hf_logits(model, prompt)) > RANGE_BOUND


@pytest.mark.parametrize("change", [with_eps_times_10, with_other_gelu])
def test_a_wrong_eps_or_gelu_in_a_bert_exceeds_the_bound(backend: str, change: Any) -> None:
    config = {**BERT_CONFIG, "layer_norm_eps": 1e-5}  # BERT's own 1e-12, times 10, is below float32's reach
    model = hf_model(config)
    graph = mutate(tiny_graph(config), change)
    executable = compile_graph(backend, graph, hf_parameters(model), max_context=128)
    expected = np.stack([hf_token_vectors(model, ids).mean(0) for ids in TEXTS])
    assert range_error(run_embeddings(executable, TEXTS), expected) > RANGE_BOUND


def test_bert_positions_off_by_one_exceed_the_bound(backend: str) -> None:
    model = hf_model(BERT_CONFIG)
    parameters = hf_parameters(model)
    name = "embeddings.position_embeddings.weight"
    parameters[name] = np.roll(parameters[name], -1, axis=0)
    executable = compile_graph(backend, tiny_graph(BERT_CONFIG), parameters, max_context=128)
    expected = np.stack([hf_token_vectors(model, ids).mean(0) for ids in TEXTS])
    assert range_error(run_embeddings(executable, TEXTS), expected) > RANGE_BOUND
