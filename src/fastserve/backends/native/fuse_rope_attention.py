"""Turns queries and keys where attention reads them, instead of in passes over memory of their own."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fastserve.graph.node import Attention, Graph, Node, Rope, RopeTable, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeAttention(Attention):
    """Attention of q and k turned by their tokens' positions."""

    table: RopeTable


def fuse_rope_attention(graph: Graph) -> Graph:
    """Take the ropes of q and k into the attention that alone reads them, where both turn by one table."""
    readers = graph.consumers()
    producers = graph.producers()
    outputs = set(graph.outputs.values())
    absorbed: set[Value] = set()  # what the absorbed ropes define
    fused: dict[Value, Node] = {}  # by what the attention defines

    def rope_of(value: Value, attention: Attention) -> Rope | None:
        """The rope that turns `value` for this attention only."""
        rope = producers[value]
        if not isinstance(rope, Rope) or rope.head_dim != attention.head_dim:
            return None
        return rope if len(readers[value]) == 1 and value not in outputs else None

    for node in graph.nodes:
        if not isinstance(node, Attention):
            continue
        q, k = rope_of(node.q, node), rope_of(node.k, node)
        if q is not None and k is not None and q.table == k.table:
            same = {f.name: getattr(node, f.name) for f in fields(Attention)}
            fused[node.out] = RopeAttention(**{**same, "q": q.x, "k": k.x}, table=q.table)
            absorbed.update((q.out, k.out))
    nodes = (
        fused.get(node.out, node) if isinstance(node, Attention) else node
        for node in graph.nodes
        if absorbed.isdisjoint(node.outputs())
    )
    return Graph(tuple(nodes), dict(graph.outputs))
