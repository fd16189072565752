"""Runs of nodes through which rows go a strip at a time, while all that they make is in a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastserve.backends.native.fuse_quantize_rows import QuantizedResult
from fastserve.backends.native.quantize_rows import QuantizeRows
from fastserve.graph.memory import Lifetimes, MemoryPlan, plan_strip
from fastserve.graph.node import (
    Activation,
    AdapterDown,
    Add,
    AddLayerNorm,
    AddRmsNorm,
    Attention,
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
    Scale,
    Slice,
    SoftCap,
    Value,
)

MAX_STRIP_ROWS = 96  # csrc/kernels/kernel.h: kRowBlock
STRIP_ALIGNMENT = 4  # csrc/stage_schedule.h: kStripAlignment
# What strips may take of a core's second-level cache, beside the weights that stream through it.
STRIP_BYTES = 512 * 2**10
# Fewer rows cost more by reading weights again than is gained.
LEAST_STRIP_ROWS = 24
# The longest sequence that is a strip by itself: it leaves the second-level cache in part, but not the third.
MAX_SEQUENCE_ROWS = 128

_ROW_WISE = (
    Activation,
    AdapterDown,
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
    Scale,
    Slice,
    SoftCap,
)


@dataclass(frozen=True, slots=True)
class Chain:
    """Consecutive nodes, by their positions in the graph, and how many rows go through them together.

    Attributes:
        values: what only these nodes read and write.
        strip: the places of `values` in memory of a thread's own; within a chain of sequences, that chain's.
        whole_sequences: the rows are all those of some sequences; else they are any rows.
    """

    nodes: range
    strip_rows: int
    values: frozenset[Value]
    strip: MemoryPlan
    whole_sequences: bool = False


def find_chains(graph: Graph) -> list[Chain]:
    """The longest runs of nodes that work token by token, and those that work sequence by sequence as well,
    where enough rows fit the cache."""
    by_sequence = [
        run for run in _runs(graph, _is_sequence_wise) if any(_is_attention(graph.nodes[i]) for i in run)
    ]
    lifetimes = Lifetimes.of(graph)
    chains = []
    for run in by_sequence:
        if rows := _strip_rows(lifetimes, run):
            strip = plan_strip(lifetimes, run, MAX_SEQUENCE_ROWS)
            values = frozenset(strip.placements)
            chains.append(Chain(run, MAX_SEQUENCE_ROWS, values, strip, whole_sequences=True))
    for run in _runs(graph, _is_row_wise):
        outer = next((chain for chain in chains if run.start in chain.nodes), None)
        rows = _strip_rows(lifetimes, outer.nodes if outer else run)
        if rows:
            strip = plan_strip(lifetimes, run, rows)
            values = frozenset(strip.placements)
            chains.append(Chain(run, rows, values, outer.strip if outer else strip))
    return chains


def _runs(graph: Graph, belongs: Callable[[Node], bool]) -> Sequence[range]:
    """The positions of two neighbouring nodes and more that belong."""
    runs = []
    start = 0
    for position in range(len(graph.nodes) + 1):
        if position < len(graph.nodes) and belongs(graph.nodes[position]):
            continue
        if position - start > 1:
            runs.append(range(start, position))
        start = position + 1
    return runs


def _strip_rows(lifetimes: Lifetimes, nodes: range) -> int:
    """Rows of a strip; 0 where too few fit the cache."""
    row_bytes = plan_strip(lifetimes, nodes, STRIP_ALIGNMENT).size_bytes / STRIP_ALIGNMENT
    rows = min(MAX_STRIP_ROWS, int(STRIP_BYTES / max(row_bytes, 1)) // STRIP_ALIGNMENT * STRIP_ALIGNMENT)
    return rows if rows >= LEAST_STRIP_ROWS else 0


def _is_row_wise(node: Node) -> bool:
    values = (*node.inputs(), *node.outputs())
    return isinstance(_op(node), _ROW_WISE) and all(value.rows is Rows.TOKENS for value in values)


def _is_sequence_wise(node: Node) -> bool:
    return _is_row_wise(node) or _is_attention(node)


def _is_attention(node: Node) -> bool:
    """Whether it is attention that reads nothing but the step's own rows."""
    op = _op(node)
    return isinstance(op, Attention) and not op.causal


def _op(node: Node) -> Node:
    return node.producer if isinstance(node, QuantizedResult) else node
