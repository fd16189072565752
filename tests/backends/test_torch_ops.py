"""The torch backend's ops, which kernels are tested against, each against its definition in numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastserve.backends.relative_bias import bucket_of_distances
from fastserve.backends.torch.executable import compile_torch
from fastserve.errors import OptionError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.check import check_graph
from fastserve.graph.node import Attention, Graph, Parameter, RelativeBias, Value
from fastserve.types import Float32Array, Limits
from native_graphs import VOCAB, misaligned, random_parameters
from parity import Run, make_batch, run_logits

LIMITS = Limits(max_tokens=64, max_outputs=64, max_sequences=4, num_blocks=16, max_context=64)
IDS = np.random.default_rng(1).integers(0, VOCAB, size=13)


def run(graph: Graph, *, chunk: int | None = None) -> tuple[Float32Array, dict[str, Float32Array]]:
    """The output for IDS, and the parameters; inputs of `inputs_of` are columns 3 .. of their tables."""
    check_graph(graph)
    parameters = random_parameters(graph)
    executable = compile_torch(graph, parameters, limits=LIMITS, block_size=8)
    return run_logits(executable, IDS.tolist(), chunk=chunk), parameters


def rows_of(table: Float32Array) -> Float32Array:
    """What `misaligned` makes of a table."""
    return table[IDS][:, 3:-3]


def finish(b: GraphBuilder, x: Value) -> Graph:
    return b.finish(logits=b.gather_rows(x))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("group", [None, 4, 12])
def test_rms_norm_norms_groups_of_columns_and_adds_its_offset_to_the_weight(
    group: int | None, offset: float
) -> None:
    b = GraphBuilder()
    actual, parameters = run(
        finish(b, b.rms_norm(misaligned(b, "x", 12), "norm", eps=0.1, offset=offset, group=group))
    )
    x = rows_of(parameters["x"]).reshape(len(IDS), -1, group or 12)
    normed = x / np.sqrt((x**2).mean(2, keepdims=True) + 0.1) * (offset + parameters["norm"])
    np.testing.assert_allclose(actual, normed.reshape(len(IDS), 12), rtol=1e-5, atol=1e-6)


def test_layer_norm_goes_without_a_bias() -> None:
    b = GraphBuilder()
    actual, parameters = run(finish(b, b.layer_norm(misaligned(b, "x", 12), "norm", None, eps=0.1)))
    x = rows_of(parameters["x"])
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 0.1) * parameters["norm"]
    np.testing.assert_allclose(actual, normed, rtol=1e-5, atol=1e-6)


def test_an_embedding_of_positions_begins_at_its_offset_and_is_scaled() -> None:
    b = GraphBuilder()
    words = b.embedding("token_ids", "words", size=VOCAB, width=6, scale=8.0)
    positions = b.embedding("positions", "positions", size=20, width=6, offset=2)
    actual, parameters = run(finish(b, b.add(words, positions)))
    expected = 8 * parameters["words"][IDS] + parameters["positions"][2 : 2 + len(IDS)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_an_offset_leaves_fewer_positions() -> None:
    b = GraphBuilder()
    words = b.embedding("token_ids", "words", size=VOCAB, width=6)
    graph = finish(b, b.add(words, b.embedding("positions", "positions", size=10, width=6, offset=2)))
    executable = compile_torch(graph, random_parameters(graph), limits=LIMITS)
    executable.run(make_batch([(Run(executable), [1] * 8)]))
    with pytest.raises(OptionError, match=r"positions holds 8, outside 0\.\.7"):
        executable.run(make_batch([(Run(executable), [1] * 9)]))


def test_soft_cap_and_scale() -> None:
    b = GraphBuilder()
    actual, parameters = run(finish(b, b.scale(b.soft_cap(misaligned(b, "x", 6), 0.5), -3.0)))
    np.testing.assert_allclose(actual, -1.5 * np.tanh(rows_of(parameters["x"]) / 0.5), rtol=1e-5)


NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 6


def attention_graph(*, causal: bool, **features: object) -> Graph:
    b = GraphBuilder()
    q = misaligned(b, "q", NUM_HEADS * HEAD_DIM)
    k, v = (misaligned(b, name, NUM_KV_HEADS * HEAD_DIM) for name in ("k", "v"))
    x = b.attention(q, k, v, layer_index=0, head_dim=HEAD_DIM, scale=0.7, causal=causal, **features)  # type: ignore[arg-type]
    return finish(b, x)


def attend(node: Attention, parameters: dict[str, Float32Array], window_of: dict[int, range]) -> Float32Array:
    """Attention by its definition, a score at a time; `window_of` is what every position sees."""
    q, k, v = (rows_of(parameters[name]).reshape(len(IDS), -1, HEAD_DIM) for name in ("q", "k", "v"))
    out = np.zeros_like(q)
    for position, seen in window_of.items():
        keys = np.array(seen)
        for head in range(NUM_HEADS):
            kv_head = head * NUM_KV_HEADS // NUM_HEADS
            scores = 0.7 * k[keys, kv_head] @ q[position, head]
            if node.soft_cap is not None:
                scores = node.soft_cap * np.tanh(scores / node.soft_cap)
            if node.bias is not None:
                buckets = bucket_of_distances(node.bias, keys - position)
                scores = scores + parameters["bias"][buckets, head]
            weights = np.exp(scores - scores.max())
            out[position, head] = weights / weights.sum() @ v[keys, kv_head]
    return out.reshape(len(IDS), -1)


def relative_bias(*, bidirectional: bool) -> RelativeBias:
    return RelativeBias(Parameter(("bias",), (8, NUM_HEADS)), max_distance=10, bidirectional=bidirectional)


@pytest.mark.parametrize("chunk", [None, 5, 1])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("soft_cap", [None, 0.8])
@pytest.mark.parametrize("bias", [None, relative_bias(bidirectional=False)])
def test_causal_attention_by_its_definition(
    window: int | None, soft_cap: float | None, bias: RelativeBias | None, chunk: int | None
) -> None:
    graph = attention_graph(causal=True, window=window, soft_cap=soft_cap, bias=bias)
    actual, parameters = run(graph, chunk=chunk)
    seen = {p: range(max(0, p - (window or 100) + 1), p + 1) for p in range(len(IDS))}
    (node,) = (node for node in graph.nodes if isinstance(node, Attention))
    np.testing.assert_allclose(actual, attend(node, parameters, seen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("soft_cap", [None, 0.8])
@pytest.mark.parametrize("bias", [None, relative_bias(bidirectional=True)])
def test_bidirectional_attention_by_its_definition(
    window: int | None, soft_cap: float | None, bias: RelativeBias | None
) -> None:
    graph = attention_graph(causal=False, window=window, soft_cap=soft_cap, bias=bias)
    actual, parameters = run(graph)
    reach = 100 if window is None else window
    seen = {p: range(max(0, p - reach), min(len(IDS), p + reach + 1)) for p in range(len(IDS))}
    (node,) = (node for node in graph.nodes if isinstance(node, Attention))
    np.testing.assert_allclose(actual, attend(node, parameters, seen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"window": 0}, {"soft_cap": 0.0}, {"bias": RelativeBias(Parameter(("b",), (8, 3)), 10, True)}]
)
def test_attention_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    graph = attention_graph(causal=True)
    nodes = tuple(replace(n, **change) if isinstance(n, Attention) else n for n in graph.nodes)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="attention"):
        check_graph(Graph(nodes, graph.outputs))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_mixture_of_experts_by_its_definition(top_k: int, normalized: bool) -> None:
    b = GraphBuilder()
    names = [[f"{part}{expert}" for expert in range(5)] for part in ("gate", "up", "down")]
    x = b.mixture_of_experts(
        misaligned(b, "x", 6),
        "router",
        *names,
        inner_width=7,
        top_k=top_k,
        normalized=normalized,
        kind="relu",
    )
    actual, parameters = run(finish(b, x))
    for row, expected in zip(rows_of(parameters["x"]), actual, strict=True):
        shares = np.exp(parameters["router"] @ row)
        shares /= shares.sum()
        chosen = np.argsort(-shares)[:top_k]
        total = shares[chosen].sum() if normalized else 1.0
        out = np.zeros(6)
        for expert in chosen:
            inner = np.maximum(parameters[f"gate{expert}"] @ row, 0) * (parameters[f"up{expert}"] @ row)
            out += shares[expert] / total * (parameters[f"down{expert}"] @ inner)
        np.testing.assert_allclose(expected, out, rtol=1e-4, atol=1e-5)


def test_a_gate_of_one_column_is_for_the_whole_row() -> None:
    b = GraphBuilder()
    gate, up = misaligned(b, "gate", 1), misaligned(b, "up", 6)
    actual, parameters = run(finish(b, b.gated_activation(gate, up, "sigmoid")))
    expected = rows_of(parameters["up"]) / (1 + np.exp(-rows_of(parameters["gate"])))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
