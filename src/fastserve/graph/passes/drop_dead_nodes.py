"""Drops nodes whose results nobody reads."""

from __future__ import annotations

from fastserve.graph.node import Graph, Node, Value


def drop_dead_nodes(graph: Graph) -> Graph:
    """Keep the nodes that some output of the graph depends on, and those that define nothing, which are there
    for what they write into the KV pool.

    Attention counts like any other node: the keys and values that it writes are read only by itself.
    """
    live: set[Value] = set(graph.outputs.values())
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if live.intersection(node.outputs()) or not node.outputs():
            live.update(node.inputs())
            kept.append(node)
    return Graph(tuple(reversed(kept)), dict(graph.outputs))
