"""Merges linears that read the same value, such as q/k/v and gate/up, into one with stacked weights."""

from __future__ import annotations

from fastserve.graph.node import Graph, Linear, Node, Parameter, Slice, Value


def merge_linears(graph: Graph) -> Graph:
    """Replace the linears of one value by one linear and slices of its output.

    Those with a bias merge apart from those without. The merged node stands where the first of them stood;
    its parameters carry the names of all, in the order in which their rows are stacked.
    """
    groups: dict[tuple[Value, bool], list[Linear]] = {}
    for node in graph.nodes:
        if isinstance(node, Linear):
            groups.setdefault((node.x, node.bias is None), []).append(node)

    index = graph.next_value_index()
    nodes: list[Node] = []
    for node in graph.nodes:
        group = groups[node.x, node.bias is None] if isinstance(node, Linear) else []
        if len(group) < 2:
            nodes.append(node)
        elif node is group[0]:
            nodes += _merge(group, index)
            index += 1
    return Graph(tuple(nodes), dict(graph.outputs))


def _merge(linears: list[Linear], index: int) -> list[Node]:
    x = linears[0].x
    merged = Linear(
        x=x,
        weight=Parameter.stack([linear.weight for linear in linears]),
        bias=Parameter.stack([linear.bias for linear in linears if linear.bias]) if linears[0].bias else None,
        out=Value(index, x.rows, sum(linear.out.width for linear in linears)),
    )
    nodes: list[Node] = [merged]
    start = 0
    for linear in linears:
        nodes.append(Slice(x=merged.out, start=start, out=linear.out))
        start += linear.out.width
    return nodes
