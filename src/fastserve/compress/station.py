"""Stations of a walk through a model: where several matrices are multiplied with the same value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from fastserve.graph.node import Graph, Linear, Node, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """The linear nodes that read one value, of those whose matrices are meant.

    Attributes:
        index: its number along the walk, from 0.
        position: of the first of all nodes that multiply with the value, in the graph: the walk pauses
            before it.
        nodes: a matrix that several nodes share is in the first station that it comes by, alone.
        values: the matrices as they are before the station [out, in], float32, by name.
        graph: the whole of the model, as its family built it.
    """

    index: int
    position: int
    nodes: tuple[Linear, ...]
    values: Mapping[str, torch.Tensor]
    graph: Graph

    @property
    def x(self) -> Value:
        """What the matrices are multiplied with [rows, in]."""
        return self.nodes[0].x

    @property
    def names(self) -> tuple[str, ...]:
        """Of the matrices."""
        return tuple(name for node in self.nodes for name in node.weight.names)

    @property
    def producer(self) -> Node:
        """The node that makes x."""
        return self.graph.producers()[self.x]

    @property
    def consumers(self) -> tuple[Node, ...]:
        """All that read x: where other nodes than the station's do, x cannot be scaled for its sake."""
        return tuple(self.graph.consumers()[self.x])


def find_stations(graph: Graph, names: Collection[str]) -> tuple[Station, ...]:
    """The stations of the matrices of these names, in the order of the walk; their `values` are empty.

    >>> from fastserve.graph.builder import GraphBuilder
    >>> b = GraphBuilder()
    >>> x = b.embedding("token_ids", "e", size=4, width=2)
    >>> y = b.add(b.linear(x, "a", width=2), b.linear(x, "b", width=2))
    >>> graph = b.finish(logits=b.gather_rows(b.linear(y, "c", width=4)))
    >>> [station.names for station in find_stations(graph, {"a", "b", "c"})]
    [('a', 'b'), ('c',)]
    """
    linears: dict[Value, list[Linear]] = {}
    first: dict[Value, int] = {}
    seen: set[str] = set()
    for position, node in enumerate(graph.nodes):
        if not isinstance(node, Linear):
            continue
        first.setdefault(node.x, position)
        (name,) = node.weight.names  # the graph is as its family built it: nothing is merged
        if name in names and name not in seen:
            linears.setdefault(node.x, []).append(node)
            seen.add(name)
    stations = sorted((first[x], tuple(nodes)) for x, nodes in linears.items())
    return tuple(
        Station(index=index, position=position, nodes=nodes, values={}, graph=graph)
        for index, (position, nodes) in enumerate(stations)
    )
