"""Quantizes activations of a linear panel by panel, so that their floats never leave the nearest cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastserve.backends.native.fuse_quantize_rows import QuantizedResult
from fastserve.backends.native.weight_scheme import PANEL
from fastserve.graph.node import Activation, ActivationKind, Graph, Linear, Node, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearActivation(Linear):
    """out = kind(x @ weight.T + bias). The producer of a QuantizedResult, never alone."""

    kind: ActivationKind


def fuse_linear_activation(graph: Graph) -> Graph:
    """Take every linear whose result only a quantized activation reads into that node, where groups of
    columns that share a scale make whole panels: who computes a panel has all that its scales depend on.
    """
    consumers = graph.consumers()
    producers = graph.producers()
    fused: dict[Value, QuantizedResult] = {}  # by what it defines
    absorbed: set[Value] = set()  # what the absorbed linears define
    for node in graph.nodes:
        if not isinstance(node, QuantizedResult) or not isinstance(node.producer, Activation):
            continue
        linear = producers[node.producer.x]
        is_read_once = len(consumers[node.producer.x]) == 1 and node.producer.x not in graph.outputs.values()
        makes_panels = node.group_size > 0 and PANEL % node.group_size == 0
        if isinstance(linear, Linear) and is_read_once and makes_panels:
            fused[node.out] = replace(node, producer=_fuse(linear, node.producer))
            absorbed.add(linear.out)
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, QuantizedResult):
            nodes.append(fused.get(node.out, node))
        elif absorbed.isdisjoint(node.outputs()):
            nodes.append(node)
    return Graph(tuple(nodes), dict(graph.outputs))


def _fuse(linear: Linear, activation: Activation) -> LinearActivation:
    return LinearActivation(
        x=linear.x, weight=linear.weight, bias=linear.bias, kind=activation.kind, out=activation.out
    )
