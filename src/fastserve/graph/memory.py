"""Where every value lives: one arena, in which buffers of values that never live together share bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastserve.graph.node import Graph, Rows, Slice, Value
from fastserve.types import Limits

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Placement:
    """A value's place: element [row, column] is at byte_offset + 4 * (row * row_stride + column)."""

    byte_offset: int  # of the first element, within the arena
    row_stride: int  # floats from one row to the next


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A placement for every value of a graph. Slices are placed inside the value that they view."""

    placements: Mapping[Value, Placement]
    size_bytes: int
    alignment: int  # bytes; of every buffer, not of every row or slice


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Bytes that one value owns, from the node that defines it to the last that reads it, both inclusive: so
    a node's outputs never share bytes with its inputs."""

    value: Value
    size_bytes: int
    first_node: int
    last_node: int

    def lives_with(self, other: _Buffer) -> bool:
        return self.first_node <= other.last_node and other.first_node <= self.last_node

    def is_within(self, chain: range) -> bool:
        return self.first_node in chain and self.last_node in chain

    def through(self, chains: Sequence[range]) -> _Buffer:
        """This buffer, or one that lives all through the chains in which, and outside of which, it lives."""
        first, last = self.first_node, self.last_node
        for chain in chains:
            if not self.is_within(chain):
                first = min(first, chain.start) if self.first_node in chain else first
                last = max(last, chain.stop - 1) if self.last_node in chain else last
        return replace(self, first_node=first, last_node=last)


def rows_of(limits: Limits) -> dict[Rows, int]:
    """How many of each kind of rows the largest step within the limits has."""
    return {
        Rows.TOKENS: limits.max_tokens,
        Rows.OUTPUTS: limits.max_outputs,
        Rows.SEQUENCES: limits.max_sequences,
    }


def plan_memory(
    graph: Graph, rows: Mapping[Rows, int], *, alignment: int = 64, chains: Sequence[range] = ()
) -> MemoryPlan:
    """Place every value as float32 [rows[value.rows], value.width] in one arena of bytes.

    `rows` are capacities: how many tokens, output rows and sequences the largest step has. The graph's
    outputs live to the end. Large buffers are placed first, each at the lowest offset that is free for its
    whole life ("greedy by size", arXiv 2001.03288).

    `chains` are runs of nodes, by their positions, that some rows may go through while others are yet to
    begin: what such a run reads from outside and what it writes for others share no bytes.

    >>> from fastserve.graph.builder import GraphBuilder
    >>> b = GraphBuilder()
    >>> x = b.embedding("token_ids", "embed.weight", size=512, width=64)
    >>> graph = b.finish(logits=b.linear(x, "head.weight", width=512))
    >>> plan_memory(graph, {Rows.TOKENS: 8}).size_bytes == 8 * (64 + 512) * 4
    True
    """
    lifetimes = Lifetimes.of(graph)
    buffers = [buffer.through(chains) for buffer in lifetimes.buffers(rows, alignment)]
    return _to_plan(lifetimes.views, buffers, alignment)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Between which nodes every value of a graph is needed.

    Attributes:
        views: for every value, the value that owns its memory and its first column therein.
        first: of every owner, the position of the node that defines it.
        last: of the last node that reads it; past all nodes where it is an output.
    """

    views: Mapping[Value, tuple[Value, int]]
    first: Mapping[Value, int]
    last: Mapping[Value, int]

    @classmethod
    def of(cls, graph: Graph) -> Lifetimes:
        views = _resolve_slices(graph)
        first: dict[Value, int] = {}
        last: dict[Value, int] = {}
        for position, node in enumerate(graph.nodes):
            for value in (*node.inputs(), *node.outputs()):
                owner, _ = views[value]
                first.setdefault(owner, position)
                last[owner] = position
        for value in graph.outputs.values():
            last[views[value][0]] = len(graph.nodes)
        return cls(views, first, last)

    def buffers(
        self, rows: Mapping[Rows, int], alignment: int, *, within: range | None = None
    ) -> list[_Buffer]:
        """Of all owners, or of those that are needed within some nodes alone."""
        return [
            _Buffer(
                owner,
                _align(rows[owner.rows] * owner.width * FLOAT_BYTES, alignment),
                first,
                self.last[owner],
            )
            for owner, first in self.first.items()
            if within is None or (first in within and self.last[owner] in within)
        ]


def plan_strip(lifetimes: Lifetimes, chain: range, num_rows: int, *, alignment: int = 64) -> MemoryPlan:
    """Place the values that live only within a chain, as float32 [num_rows, value.width], in memory of their
    own: what so many rows that go through the chain together need."""
    buffers = lifetimes.buffers(dict.fromkeys(Rows, num_rows), alignment, within=chain)
    owners = {buffer.value for buffer in buffers}
    views = {value: view for value, view in lifetimes.views.items() if view[0] in owners}
    return _to_plan(views, buffers, alignment)


def _to_plan(
    views: Mapping[Value, tuple[Value, int]], buffers: Sequence[_Buffer], alignment: int
) -> MemoryPlan:
    offsets = _place(buffers)
    placements = {
        value: Placement(offsets[owner] + column * FLOAT_BYTES, owner.width)
        for value, (owner, column) in views.items()
    }
    size = max((offsets[b.value] + b.size_bytes for b in buffers), default=0)
    return MemoryPlan(placements, size, alignment)


def _resolve_slices(graph: Graph) -> dict[Value, tuple[Value, int]]:
    """For every value, the value that owns its memory and its first column therein."""
    views: dict[Value, tuple[Value, int]] = {}
    for node in graph.nodes:
        if isinstance(node, Slice):
            owner, column = views[node.x]
            views[node.out] = (owner, column + node.start)
        else:
            views.update({value: (value, 0) for value in node.outputs()})
    return views


def _place(buffers: Sequence[_Buffer]) -> dict[Value, int]:
    placed: list[tuple[int, _Buffer]] = []  # ascending offsets
    for buffer in sorted(buffers, key=lambda b: (-b.size_bytes, b.first_node)):
        offset = 0
        for taken_offset, taken in placed:
            if not buffer.lives_with(taken):
                continue
            if offset + buffer.size_bytes <= taken_offset:
                break
            offset = max(offset, taken_offset + taken.size_bytes)
        placed.append((offset, buffer))
        placed.sort(key=lambda entry: entry[0])
    return {buffer.value: offset for offset, buffer in placed}


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
