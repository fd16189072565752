"""Lets every linear have low-rank matrices added to it, row by row those of the row's adapter."""

from __future__ import annotations

from fastserve.graph.node import AdaptedLinear, AdapterDown, Graph, Linear, Node, Rows, Value


def add_adapters(graph: Graph, max_rank: int) -> Graph:
    """Replace every linear of an optimized graph by an adapted one, after the product that it reads.

    Rows without an adapter keep their values, so the outputs of a step without adapters are those of `graph`,
    which is quicker to run. `max_rank` is the most of an adapter's matrices (see `max_rank_at`), each of
    which changes one part of a merged weight.
    """
    index = graph.next_value_index()
    nodes: list[Node] = []
    for node in graph.nodes:
        if type(node) is not Linear:
            nodes.append(node)
            continue
        low = Value(index, node.x.rows, max_rank_at(node, max_rank) * len(node.weight.names))
        index += 1
        nodes += (
            AdapterDown(x=node.x, weight=node.weight, out=low),
            AdaptedLinear(x=node.x, weight=node.weight, bias=node.bias, out=node.out, low=low),
        )
    return Graph(tuple(nodes), dict(graph.outputs))


def max_rank_at(linear: Linear, max_rank: int) -> int:
    """The most of an adapter's matrices for a linear: `max_rank`, but where it has a row for each sequence,
    as the head of a classifier, as much as it takes to replace it."""
    return max(max_rank, min(linear.weight.shape)) if linear.out.rows is Rows.SEQUENCES else max_rank
