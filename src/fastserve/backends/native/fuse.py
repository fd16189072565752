"""The passes that make an optimized graph one of the native backend's calls."""

from __future__ import annotations

from collections.abc import Callable

from fastserve.backends.native.fuse_linear_activation import fuse_linear_activation
from fastserve.backends.native.fuse_quantize_rows import fuse_quantize_rows
from fastserve.backends.native.fuse_rope_attention import fuse_rope_attention
from fastserve.backends.native.quantize_rows import quantize_rows
from fastserve.backends.native.route_experts import route_experts
from fastserve.graph.node import Graph, Parameter


def fuse(graph: Graph, group_size_of: Callable[[Parameter], int | None]) -> Graph:
    """`group_size_of` is how many columns of a matrix's activations share a scale; None: they stay floats."""
    routed = route_experts(fuse_rope_attention(graph), group_size_of)
    quantized = quantize_rows(routed, lambda linear: group_size_of(linear.weight))
    return fuse_linear_activation(fuse_quantize_rows(quantized))
