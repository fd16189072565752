"""Quantizes results where they are made, so that their floats never go to memory."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.backends.native.quantize_rows import QuantizeRows
from fastserve.graph.node import (
    Activation,
    Add,
    AddLayerNorm,
    AddRmsNorm,
    Attention,
    CrossAttention,
    GatedActivation,
    GatherRows,
    Graph,
    LayerNorm,
    Linear,
    Node,
    Parameter,
    RmsNorm,
    Value,
)

# Their calls can quantize what they write.
Producer = (
    Activation
    | Add
    | AddLayerNorm
    | AddRmsNorm
    | Attention
    | CrossAttention
    | GatedActivation
    | GatherRows
    | LayerNorm
    | RmsNorm
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedResult(Node):
    """`producer`, whose result is quantized to `out` as QuantizeRows would, and kept in no other form."""

    producer: Producer | Linear  # a linear only with its activation (fuse_linear_activation)
    group_size: int
    out: Value

    def inputs(self) -> tuple[Value, ...]:
        return self.producer.inputs()

    def outputs(self) -> tuple[Value, ...]:
        return (*(value for value in self.producer.outputs() if value != self.producer.out), self.out)

    def parameters(self) -> tuple[Parameter, ...]:
        return self.producer.parameters()


def fuse_quantize_rows(graph: Graph) -> Graph:
    """Replace every producer whose result only one QuantizeRows reads, and that QuantizeRows, by one node."""
    consumers = graph.consumers()
    producers = graph.producers()
    fused: dict[Value, Node] = {}  # by the result that is quantized
    for node in graph.nodes:
        if not isinstance(node, QuantizeRows):
            continue
        producer = producers[node.x]
        if not isinstance(producer, Producer) or producer.out != node.x:
            continue
        is_read_as_floats = len(consumers[node.x]) > 1 or node.x in graph.outputs.values()
        if not is_read_as_floats and _can_quantize(producer, node.group_size):
            fused[node.x] = QuantizedResult(producer=producer, group_size=node.group_size, out=node.out)
    nodes = (
        next((fused[value] for value in node.outputs() if value in fused), node)
        for node in graph.nodes
        if not (isinstance(node, QuantizeRows) and node.x in fused)
    )
    return Graph(tuple(nodes), dict(graph.outputs))


def _can_quantize(producer: Producer, group_size: int) -> bool:
    """Whether whoever computes columns of a row computes whole groups: attention goes by key heads."""
    if not isinstance(producer, Attention | CrossAttention) or producer.num_kv_heads == 1:
        return True
    return group_size > 0 and producer.q.width // producer.num_kv_heads % group_size == 0
