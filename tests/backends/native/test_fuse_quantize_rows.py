"""Fusing the quantization of activations changes which calls run, never a bit of what they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native import executable as native
from fastserve.backends.native import fuse
from fastserve.backends.native.fuse_quantize_rows import QuantizedResult, fuse_quantize_rows
from fastserve.backends.native.quantize_rows import quantize_rows
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Value
from fastserve.graph.passes import fuse_add_norm
from fastserve.types import Float32Array, Limits
from native_graphs import VOCAB, misaligned, random_parameters
from parity import run_logits, store_f32

LIMITS = Limits(max_tokens=64, max_outputs=64, max_sequences=1, num_blocks=2, max_context=64)

PRODUCERS: Mapping[str, Callable[[GraphBuilder, Value, Value], Value]] = {
    "activation": lambda b, x, y: b.activation(x, "gelu"),
    "add": lambda b, x, y: b.add(x, y),
    "add_layer_norm": lambda b, x, y: b.layer_norm(b.add(x, y), "norm", "bias", eps=1e-5),
    "add_rms_norm": lambda b, x, y: b.rms_norm(b.add(x, y), "norm", eps=1e-5),
    "gated_activation": lambda b, x, y: b.gated_activation(x, y, "silu"),
    "gather_rows": lambda b, x, y: b.gather_rows(x),
    "layer_norm": lambda b, x, y: b.layer_norm(x, "norm", "bias", eps=1e-5),
    "rms_norm": lambda b, x, y: b.rms_norm(x, "norm", eps=1e-5),
}


def graph_of(producer: str, width: int, *, outputs_too: bool = False) -> Graph:
    """A linear of what the op makes; with `outputs_too`, its floats are read as well."""
    b = GraphBuilder()
    made = PRODUCERS[producer](b, misaligned(b, "x", width), misaligned(b, "y", width, offset=5))
    logits = b.linear(made, "weight", width=9)
    if producer != "gather_rows":
        logits = b.gather_rows(logits)
    return fuse_add_norm(b.finish(logits=logits, **({"made": made} if outputs_too else {})))


def run(graph: Graph, *, isa: str) -> Float32Array:
    parameters = store_f32(random_parameters(graph))
    executable = native.compile_native(graph, parameters, weights="int8", limits=LIMITS, isa=isa)
    return run_logits(executable, [5 * i % VOCAB for i in range(23)])


@pytest.mark.parametrize("isa", _native.runnable_isas())
@pytest.mark.parametrize("width", [1, 63, 64, 131])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_result_that_is_quantized_where_it_is_made_has_the_same_bits(
    producer: str, width: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(producer, width)
    fused = run(graph, isa=isa)
    monkeypatch.setattr(fuse, "fuse_quantize_rows", lambda graph: graph)
    np.testing.assert_array_equal(fused, run(graph, isa=isa))


@pytest.mark.parametrize("producer", PRODUCERS)
def test_every_producer_takes_in_the_quantization_of_its_result(producer: str) -> None:
    graph = quantize_rows(graph_of(producer, 64), lambda linear: 64)
    ops = [node.producer.op for node in fuse_quantize_rows(graph).nodes if isinstance(node, QuantizedResult)]
    assert ops == [producer]
    assert not any(node.op == "quantize_rows" for node in fuse_quantize_rows(graph).nodes)


@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_result_whose_floats_are_read_too_keeps_them(producer: str) -> None:
    graph = quantize_rows(graph_of(producer, 64, outputs_too=True), lambda linear: 64)
    assert fuse_quantize_rows(graph) == graph


def test_a_sum_that_is_read_beside_its_norm_stays_float() -> None:
    b = GraphBuilder()
    total = b.add(misaligned(b, "x", 64), misaligned(b, "y", 64))
    normed = b.linear(b.rms_norm(total, "norm", eps=1e-5), "weight", width=64)
    graph = fuse_add_norm(b.finish(logits=b.gather_rows(b.add(total, normed))))
    fused = fuse_quantize_rows(quantize_rows(graph, lambda linear: 0))
    (node,) = (node for node in fused.nodes if isinstance(node, QuantizedResult))
    assert node.outputs() == (total, node.out)


def attention_graph(*, num_heads: int, num_kv_heads: int) -> Graph:
    b = GraphBuilder()
    q, k, v = (
        misaligned(b, name, 32 * n)
        for name, n in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads))
    )
    y = b.attention(q, k, v, layer_index=0, head_dim=32, scale=0.2, causal=True)
    return b.finish(logits=b.gather_rows(b.linear(y, "weight", width=9)))


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "group_size", "is_fused"),
    [
        (4, 2, 64, True),
        (4, 2, 32, True),
        (6, 2, 64, False),
        (4, 2, 0, False),
        (3, 1, 0, True),
        (3, 1, 64, True),
    ],
)
def test_attention_quantizes_its_result_where_no_group_spans_key_heads(
    num_heads: int, num_kv_heads: int, group_size: int, is_fused: bool
) -> None:
    graph = attention_graph(num_heads=num_heads, num_kv_heads=num_kv_heads)
    fused = fuse_quantize_rows(quantize_rows(graph, lambda linear: group_size))
    assert any(isinstance(node, QuantizedResult) for node in fused.nodes) == is_fused


@pytest.mark.parametrize("isa", _native.runnable_isas())
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 2), (3, 1)])
def test_attention_that_quantizes_its_result_has_the_same_bits(
    num_heads: int, num_kv_heads: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = attention_graph(num_heads=num_heads, num_kv_heads=num_kv_heads)
    fused = run(graph, isa=isa)
    monkeypatch.setattr(fuse, "fuse_quantize_rows", lambda graph: graph)
    np.testing.assert_array_equal(fused, run(graph, isa=isa))
