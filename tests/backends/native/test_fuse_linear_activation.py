"""Quantizing a linear's activations panel by panel changes which calls run, never a bit of their results."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native import executable as native
from fastserve.backends.native import fuse, layout
from fastserve.backends.native.fuse_linear_activation import fuse_linear_activation
from fastserve.backends.native.fuse_quantize_rows import fuse_quantize_rows
from fastserve.backends.native.quantize_rows import quantize_rows
from fastserve.config import WeightFormat
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph
from fastserve.types import Float32Array, Limits
from native_graphs import VOCAB, columns, misaligned, random_parameters
from parity import run_logits, store_f32

LIMITS = Limits(max_tokens=256, max_outputs=256, max_sequences=1, num_blocks=64, max_context=256)


def graph_of(depth: int, width: int, *, has_bias: bool = True, outputs_too: bool = False) -> Graph:
    """Two linears with an activation between; with `outputs_too`, the first one's floats are read as well."""
    b = GraphBuilder()
    x = b.linear(misaligned(b, "x", depth), "up", width=width, bias="bias" if has_bias else None)
    y = b.linear(b.activation(x, "gelu"), "down", width=9)
    return b.finish(logits=b.gather_rows(y), **({"x": x} if outputs_too else {}))


def gated_graph_of(depth: int, width: int, *, has_bias: bool = True, outputs_too: bool = False) -> Graph:
    """Gate and up of one linear between two; with `outputs_too`, the gate's floats are read as well."""
    b = GraphBuilder()
    both = b.linear(misaligned(b, "x", depth), "gate_up", width=2 * width, bias="bias" if has_bias else None)
    gate, up = columns(b, both, 0, width), columns(b, both, width, width)
    y = b.linear(b.gated_activation(gate, up, "silu"), "down", width=9)
    return b.finish(logits=b.gather_rows(y), **({"gate": gate} if outputs_too else {}))


def run(
    graph: Graph, num_tokens: int, *, isa: str, threads: int = 1, weights: WeightFormat = "int8"
) -> Float32Array:
    parameters = store_f32(random_parameters(graph))
    executable = native.compile_native(
        graph, parameters, weights=weights, limits=LIMITS, isa=isa, threads=threads
    )
    return run_logits(executable, [5 * i % VOCAB for i in range(num_tokens)])


@pytest.mark.parametrize("isa", _native.runnable_isas())
@pytest.mark.parametrize("num_tokens", [1, 13, 97, 200])
@pytest.mark.parametrize(("depth", "width"), [(1, 1), (17, 63), (64, 64), (65, 131), (257, 257)])
@pytest.mark.parametrize("weights", ["int8", "int8:g32", "int4", "int4:asymmetric"])
def test_an_activation_quantized_with_its_linear_has_the_same_bits(
    weights: WeightFormat, depth: int, width: int, num_tokens: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(depth, width, has_bias=depth != 65)
    fused = run(graph, num_tokens, isa=isa, weights=weights, threads=2)
    monkeypatch.setattr(fuse, "fuse_linear_activation", lambda graph: graph)
    monkeypatch.setattr(layout, "find_chains", lambda graph: [])
    np.testing.assert_array_equal(fused, run(graph, num_tokens, isa=isa, weights=weights))


@pytest.mark.parametrize("isa", _native.runnable_isas())
@pytest.mark.parametrize("num_tokens", [1, 13, 97, 200])
@pytest.mark.parametrize(("depth", "width"), [(1, 64), (17, 128), (65, 192), (257, 320)])
@pytest.mark.parametrize("weights", ["int8", "int8:g32", "int4", "int4:asymmetric"])
def test_a_gated_activation_quantized_with_its_linear_has_the_same_bits(
    weights: WeightFormat, depth: int, width: int, num_tokens: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = gated_graph_of(depth, width, has_bias=depth != 65)
    fused = run(graph, num_tokens, isa=isa, weights=weights, threads=2)
    monkeypatch.setattr(fuse, "fuse_linear_activation", lambda graph: graph)
    monkeypatch.setattr(layout, "find_chains", lambda graph: [])
    np.testing.assert_array_equal(fused, run(graph, num_tokens, isa=isa, weights=weights))


def ops_of(graph: Graph, group_size: int = 64) -> list[str]:
    quantized = fuse_quantize_rows(quantize_rows(graph, lambda linear: group_size))
    return [getattr(node, "producer", node).op for node in fuse_linear_activation(quantized).nodes]


@pytest.mark.parametrize(("width", "is_fused"), [(64, True), (192, True), (63, False), (96, False)])
def test_gates_of_whole_panels_are_quantized_with_their_linear(width: int, is_fused: bool) -> None:
    ops = ops_of(gated_graph_of(64, width))
    assert ("linear_gated_activation" in ops) == is_fused
    assert ("gated_activation" in ops) != is_fused


def test_a_gate_whose_floats_are_read_too_keeps_them() -> None:
    assert "gated_activation" in ops_of(gated_graph_of(64, 64, outputs_too=True))


def test_a_gate_that_comes_second_is_not_taken_for_the_first() -> None:
    b = GraphBuilder()
    both = b.linear(misaligned(b, "x", 64), "up_gate", width=128)
    up, gate = columns(b, both, 0, 64), columns(b, both, 64, 64)
    y = b.linear(b.gated_activation(gate, up, "silu"), "down", width=9)
    assert "gated_activation" in ops_of(b.finish(logits=b.gather_rows(y)))


@pytest.mark.parametrize(
    ("group_size", "is_fused"), [(64, True), (32, True), (0, False), (128, False), (48, False)]
)
def test_only_groups_that_make_whole_panels_are_quantized_with_their_linear(
    group_size: int, is_fused: bool
) -> None:
    ops = ops_of(graph_of(64, 256), group_size)
    assert ("linear_activation" in ops) == is_fused
    assert ("activation" in ops) != is_fused


def test_a_linear_whose_floats_are_read_too_keeps_them() -> None:
    graph = fuse_quantize_rows(quantize_rows(graph_of(64, 64, outputs_too=True), lambda linear: 64))
    assert fuse_linear_activation(graph) == graph
