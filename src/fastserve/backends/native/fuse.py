"""The passes that make an optimized graph one of the native backend's calls."""

from __future__ import annotations

from collections.abc import Callable

from fastserve.backends.native.fuse_linear_activation import fuse_linear_activation
from fastserve.backends.native.fuse_quantize_rows import fuse_quantize_rows
from fastserve.backends.native.fuse_rope_attention import fuse_rope_attention
from fastserve.backends.native.quantize_rows import quantize_rows
from fastserve.graph.node import Graph, Linear


def fuse(graph: Graph, group_size_of: Callable[[Linear], int | None]) -> Graph:
    """`group_size_of` is how many columns of a linear's activations share a scale; None: they stay floats."""
    quantized = quantize_rows(fuse_rope_attention(graph), group_size_of)
    return fuse_linear_activation(fuse_quantize_rows(quantized))
