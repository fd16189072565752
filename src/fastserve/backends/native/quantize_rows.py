"""The native backend's own op and pass: activations of integer linears are quantized, once per value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastserve.backends.native.weight_scheme import DEPTH_ALIGNMENT
from fastserve.graph.node import Graph, Linear, Node, Value

ALIGNMENT = 64  # bytes, of a row and of its scales (csrc/step.h: QuantizedLayout)
FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRows(Node):
    """out = x as int8 with a float32 scale and an int32 correction per row and group of columns.

    A row of `out` holds the values, then (from a multiple of ALIGNMENT) the scales and the corrections,
    padded to a multiple of ALIGNMENT: its width is that size counted in floats.
    """

    x: Value
    group_size: int  # columns that share a scale; 0: all of them
    out: Value


def quantize_rows(graph: Graph, group_size_of: Callable[[Linear], int | None]) -> Graph:
    """Put a QuantizeRows before every linear for which `group_size_of` gives a group size (0: whole rows).

    Linears that read the same value with the same group size share it.
    """
    nodes: list[Node] = []
    quantized: dict[tuple[Value, int], Value] = {}
    next_index = graph.next_value_index()
    for node in graph.nodes:
        group_size = group_size_of(node) if isinstance(node, Linear) else None
        if not isinstance(node, Linear) or group_size is None:
            nodes.append(node)
            continue
        key = (node.x, group_size)
        if key not in quantized:
            width = row_bytes(node.x.width, group_size) // FLOAT_BYTES
            quantized[key] = Value(next_index, node.x.rows, width)
            next_index += 1
            nodes.append(QuantizeRows(x=node.x, group_size=group_size, out=quantized[key]))
        nodes.append(replace(node, x=quantized[key]))
    return Graph(tuple(nodes), graph.outputs)


def row_bytes(width: int, group_size: int) -> int:
    """Bytes of a quantized row of `width` columns."""
    padded = _round_up(width, DEPTH_ALIGNMENT)
    num_groups = -(-padded // (group_size or padded))
    return _round_up(_round_up(padded, ALIGNMENT) + 2 * FLOAT_BYTES * num_groups, ALIGNMENT)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
