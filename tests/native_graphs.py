"""Small graphs with odd sizes and misaligned rows, for tests of single native ops."""

from __future__ import annotations

import numpy as np

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Slice, Value
from fastserve.types import Float32Array

VOCAB = 40


def random_parameters(graph: Graph) -> dict[str, Float32Array]:
    rng = np.random.default_rng(7)
    found = {p for node in graph.nodes for p in node.parameters()}
    return {
        p.names[0]: rng.normal(size=p.shape).astype(np.float32) for p in sorted(found, key=lambda p: p.names)
    }


def misaligned(builder: GraphBuilder, name: str, width: int, *, offset: int = 3) -> Value:
    """Random rows by token, of which `width` columns from an odd one on are seen."""
    whole = builder.embedding("token_ids", name, size=VOCAB, width=width + 2 * offset)
    return columns(builder, whole, offset, width)


def columns(builder: GraphBuilder, x: Value, start: int, width: int) -> Value:
    """Columns of a value: the builder has no slices, which only passes make."""
    out = builder._value(x.rows, width)
    builder._nodes.append(Slice(x=x, start=start, out=out))
    return out
