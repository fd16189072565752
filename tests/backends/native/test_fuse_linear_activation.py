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
from native_graphs import VOCAB, misaligned, random_parameters
from parity import run_logits, store_f32

LIMITS = Limits(max_tokens=256, max_outputs=256, max_sequences=1, num_blocks=64, max_context=256)


def graph_of(depth: int, width: int, *, has_bias: bool = True, outputs_too: bool = False) -> Graph:
    """Two linears with an activation between; with `outputs_too`, the first one's floats are read as well."""
    b = GraphBuilder()
    x = b.linear(misaligned(b, "x", depth), "up", width=width, bias="bias" if has_bias else None)
    y = b.linear(b.activation(x, "gelu"), "down", width=9)
    return b.finish(logits=b.gather_rows(y), **({"x": x} if outputs_too else {}))


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


@pytest.mark.parametrize(
    ("group_size", "is_fused"), [(64, True), (32, True), (0, False), (128, False), (48, False)]
)
def test_only_groups_that_make_whole_panels_are_quantized_with_their_linear(
    group_size: int, is_fused: bool
) -> None:
    graph = fuse_quantize_rows(quantize_rows(graph_of(64, 256), lambda linear: group_size))
    ops = [getattr(node, "producer", node).op for node in fuse_linear_activation(graph).nodes]
    assert ("linear_activation" in ops) == is_fused
    assert ("activation" in ops) != is_fused


def test_a_linear_whose_floats_are_read_too_keeps_them() -> None:
    graph = fuse_quantize_rows(quantize_rows(graph_of(64, 64, outputs_too=True), lambda linear: 64))
    assert fuse_linear_activation(graph) == graph
