"""Has the positions of texts begin after slots that are empty."""

from __future__ import annotations

from dataclasses import replace

from fastserve.graph.node import Attention, Embedding, Graph, Node, Rope


def leave_slots_empty(graph: Graph, count: int) -> Graph:
    """The graph of the same model in which nobody sees the first `count` slots of a sequence: what lies at
    slot s is computed as what was at position s - count.

    `Batch.positions` are slots, those of its rows at least `count`. Before fusion: no rope is part of an
    attention yet.
    """

    def shifted(node: Node) -> Node:
        match node:
            case Embedding(ids="positions"):
                return replace(node, offset=node.offset - count)
            case Rope():
                return replace(node, table=replace(node.table, offset=node.table.offset - count))
            case Attention():
                return replace(node, first_key=node.first_key + count)
        return node

    return Graph(tuple(map(shifted, graph.nodes)), dict(graph.outputs))
