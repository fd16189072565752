"""Runs of row-wise nodes, through which rows go a strip at a time while all that they make is in a cache."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.backends.native.fuse_quantize_rows import QuantizedResult
from fastserve.backends.native.quantize_rows import QuantizeRows
from fastserve.graph.memory import MemoryPlan, plan_strip
from fastserve.graph.node import (
    Activation,
    Add,
    AddLayerNorm,
    AddRmsNorm,
    Embedding,
    GatedActivation,
    Graph,
    L2Normalize,
    LayerNorm,
    Linear,
    Node,
    RmsNorm,
    Rope,
    Rows,
    Slice,
)

MAX_STRIP_ROWS = 96  # csrc/kernels/kernel.h: kRowBlock
STRIP_ALIGNMENT = 4  # csrc/plan.cpp: kStripAlignment
# What strips may take of a core's second-level cache, beside the weights that stream through it.
STRIP_BYTES = 512 * 2**10
# Fewer rows cost more by reading weights again than is gained.
LEAST_STRIP_ROWS = 24

_ROW_WISE = (
    Activation,
    Add,
    AddLayerNorm,
    AddRmsNorm,
    Embedding,
    GatedActivation,
    L2Normalize,
    LayerNorm,
    Linear,
    QuantizeRows,
    RmsNorm,
    Rope,
    Slice,
)


@dataclass(frozen=True, slots=True)
class Chain:
    """Consecutive nodes of a graph, and how many rows go through them together."""

    nodes: range  # their positions
    strip_rows: int
    strip: MemoryPlan  # of so many rows of the values that only these nodes read and write


def find_chains(graph: Graph) -> list[Chain]:
    """The longest runs of two nodes and more that work token by token, where enough rows fit the cache."""
    chains = []
    start = 0
    for position, node in enumerate((*graph.nodes, None)):
        if node is not None and _is_row_wise(node):
            continue
        if position - start > 1 and (chain := _make_chain(graph, range(start, position))):
            chains.append(chain)
        start = position + 1
    return chains


def _make_chain(graph: Graph, nodes: range) -> Chain | None:
    row_bytes = plan_strip(graph, nodes, STRIP_ALIGNMENT).size_bytes / STRIP_ALIGNMENT
    rows = min(MAX_STRIP_ROWS, int(STRIP_BYTES / max(row_bytes, 1)) // STRIP_ALIGNMENT * STRIP_ALIGNMENT)
    return Chain(nodes, rows, plan_strip(graph, nodes, rows)) if rows >= LEAST_STRIP_ROWS else None


def _is_row_wise(node: Node) -> bool:
    op = node.producer if isinstance(node, QuantizedResult) else node
    values = (*node.inputs(), *node.outputs())
    return isinstance(op, _ROW_WISE) and all(value.rows is Rows.TOKENS for value in values)
