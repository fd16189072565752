"""The memory that a mixture of experts works in: rows gathered by expert, and what experts make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from fastserve.backends.native.quantize_rows import FLOAT_BYTES, row_bytes
from fastserve.graph.node import Graph, MixtureOfExperts, Node, Parameter, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedExperts(MixtureOfExperts):
    """A mixture of experts and what it writes on the way. A row of the last three holds `top_k` rows, one for
    each of its experts; those of `out_gathered` and `out_inner` are quantized where they have a group size.
    """

    gathered_group_size: int | None
    inner_group_size: int | None
    out_logits: Value
    out_gathered: Value  # x
    out_inner: Value  # kind(gate) * up
    out_results: Value


def route_experts(graph: Graph, group_size_of: Callable[[Parameter], int | None]) -> Graph:
    """`group_size_of` is how many columns of what meets a matrix share a scale; None: they stay floats."""
    nodes: list[Node] = []
    index = graph.next_value_index()
    for node in graph.nodes:
        if isinstance(node, MixtureOfExperts):
            nodes.append(_route(node, group_size_of, index))
            index += 4
        else:
            nodes.append(node)
    return Graph(tuple(nodes), dict(graph.outputs))


def _route(
    node: MixtureOfExperts, group_size_of: Callable[[Parameter], int | None], index: int
) -> RoutedExperts:
    width, inner_width = node.x.width, node.gates[0].shape[0]
    gathered, inner = group_size_of(node.gates[0]), group_size_of(node.downs[0])
    floats = (
        node.num_experts,
        node.top_k * _row_floats(width, gathered),
        node.top_k * _row_floats(inner_width, inner),
        node.top_k * width,
    )
    logits, gathered_rows, inner_rows, results = (
        Value(index + i, node.out.rows, count) for i, count in enumerate(floats)
    )
    return RoutedExperts(
        **{f.name: getattr(node, f.name) for f in fields(MixtureOfExperts)},
        gathered_group_size=gathered,
        inner_group_size=inner,
        out_logits=logits,
        out_gathered=gathered_rows,
        out_inner=inner_rows,
        out_results=results,
    )


def _row_floats(width: int, group_size: int | None) -> int:
    return width if group_size is None else row_bytes(width, group_size) // FLOAT_BYTES
