"""Gathers output rows as early as possible: what follows the last attention runs for output rows only."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from fastserve.graph.node import (
    Activation,
    Add,
    AddLayerNorm,
    AddRmsNorm,
    GatedActivation,
    GatherRows,
    Graph,
    L2Normalize,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Node,
    RmsNorm,
    Rows,
    Scale,
    Slice,
    SoftCap,
    Value,
)

# A row of what these give depends on the same row of what they read and on nothing else. Embedding and Rope
# are not among them: they read the batch's ids and positions, which stay in token rows.
_ROW_WISE = (
    Activation,
    Add,
    AddLayerNorm,
    AddRmsNorm,
    GatedActivation,
    L2Normalize,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    RmsNorm,
    Scale,
    Slice,
    SoftCap,
)


def hoist_gather_rows(graph: Graph) -> Graph:
    """Move every gather_rows up through the row-wise nodes whose results are read in output rows only."""
    moved = _values_read_in_output_rows(graph)
    in_output_rows: dict[Value, Value] = {}  # token-row value -> the same in output rows
    indices = count(graph.next_value_index())
    nodes: list[Node] = []
    renamed: dict[Value, Value] = {}  # what a removed gather gave -> what replaces it

    def gathered(value: Value) -> Value:
        if value.rows is Rows.OUTPUTS:
            return renamed.get(value, value)
        if value not in in_output_rows:
            out = Value(next(indices), Rows.OUTPUTS, value.width)
            nodes.append(GatherRows(x=value, out=out))
            in_output_rows[value] = out
        return in_output_rows[value]

    for node in graph.nodes:
        if isinstance(node, GatherRows):
            renamed[node.out] = gathered(node.x)
        elif moved.isdisjoint(node.outputs()) or (isinstance(node, Slice) and node.x not in in_output_rows):
            # A slice of a value that stays in token rows stays too: its rows are shorter to gather.
            nodes.append(node.with_inputs(lambda value: renamed.get(value, value)))
        else:
            hoisted = node.with_inputs(gathered)
            for value in node.outputs():
                in_output_rows[value] = replace(value, rows=Rows.OUTPUTS)
            nodes.append(hoisted.with_values(lambda value: replace(value, rows=Rows.OUTPUTS)))
    outputs = {name: renamed.get(value, value) for name, value in graph.outputs.items()}
    return Graph(tuple(nodes), outputs)


def _values_read_in_output_rows(graph: Graph) -> set[Value]:
    """Results of row-wise nodes that only gathers read, and row-wise nodes of which the same holds."""
    consumers = graph.consumers()
    kept = set(graph.outputs.values())
    moved: set[Value] = set()
    for node in reversed(graph.nodes):
        if isinstance(node, _ROW_WISE) and all(
            value.rows is Rows.TOKENS
            and value not in kept
            and value in consumers
            and all(isinstance(r, GatherRows) or not moved.isdisjoint(r.outputs()) for r in consumers[value])
            for value in node.outputs()
        ):
            moved.update(node.outputs())
    return moved
