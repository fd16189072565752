"""Fuses a residual addition with the norm that reads it, so that the sum is not read back from memory."""

from __future__ import annotations

from typing import TypeGuard

from fastserve.graph.node import Add, AddLayerNorm, AddRmsNorm, Graph, LayerNorm, Node, RmsNorm, Value


def fuse_add_norm(graph: Graph) -> Graph:
    """Replace every add that a norm of whole rows reads, and the first such norm, by one node where the add
    stood.

    The fused node gives the sum too where another node or the caller reads it.
    """
    consumers = graph.consumers()
    fused: dict[Value, Node] = {}  # by the sum that the add defines
    absorbed: set[Value] = set()  # what the absorbed norms define
    for node in graph.nodes:
        if not isinstance(node, Add):
            continue
        readers = consumers.get(node.out, [])
        norm = next((reader for reader in readers if _is_norm_of_rows(reader)), None)
        if norm is None:
            continue
        is_sum_read = len(readers) > 1 or node.out in graph.outputs.values()
        fused[node.out] = _fuse(node, norm, node.out if is_sum_read else None)
        absorbed.add(norm.out)

    nodes = tuple(
        fused.get(node.out, node) if isinstance(node, Add) else node
        for node in graph.nodes
        if absorbed.isdisjoint(node.outputs())
    )
    return Graph(nodes, dict(graph.outputs))


def _is_norm_of_rows(node: Node) -> TypeGuard[RmsNorm | LayerNorm]:
    return isinstance(node, RmsNorm | LayerNorm) and node.weight.shape == (node.x.width,)


def _fuse(add: Add, norm: RmsNorm | LayerNorm, out_sum: Value | None) -> Node:
    if isinstance(norm, RmsNorm):
        return AddRmsNorm(
            x=add.x,
            y=add.y,
            weight=norm.weight,
            eps=norm.eps,
            offset=norm.offset,
            out_sum=out_sum,
            out=norm.out,
        )
    return AddLayerNorm(
        x=add.x,
        y=add.y,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        out_sum=out_sum,
        out=norm.out,
    )
