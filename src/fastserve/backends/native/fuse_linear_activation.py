"""Quantizes activations of a linear panel by panel, so that their floats never leave the nearest cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeGuard

from fastserve.backends.native.fuse_quantize_rows import QuantizedResult
from fastserve.backends.native.weight_scheme import PANEL
from fastserve.graph.node import (
    Activation,
    ActivationKind,
    AdaptedLinear,
    GatedActivation,
    Graph,
    Linear,
    Node,
    Slice,
    Value,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearActivation(Linear):
    """out = kind(x @ weight.T + bias). The producer of a QuantizedResult, never alone."""

    kind: ActivationKind


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGatedActivation(Linear):
    """out = kind(gate) * up, where x @ weight.T + bias is gate, then up. Never alone either."""

    kind: ActivationKind


def fuse_linear_activation(graph: Graph) -> Graph:
    """Take every linear whose result only a quantized activation reads into that node, where groups of
    columns that share a scale make whole panels: who computes a panel has all that its scales depend on.
    Of a gated activation, the gate and what it gates are halves of one linear, each whole panels.
    """
    fused: dict[Value, QuantizedResult] = {}  # by what it defines
    absorbed: set[Value] = set()  # what the absorbed linears and their slices define
    consumers = graph.consumers()
    producers = graph.producers()

    def is_read_by(value: Value, *readers: Node) -> bool:
        """Whether these read it, and nobody else."""
        return tuple(consumers[value]) == readers and value not in graph.outputs.values()

    for node in graph.nodes:
        if not isinstance(node, QuantizedResult) or node.group_size <= 0 or PANEL % node.group_size != 0:
            continue
        activation = node.producer
        if isinstance(activation, Activation):
            linear = producers[activation.x]
            if _is_plain(linear) and is_read_by(linear.out, node):
                fused[node.out] = _fuse(node, LinearActivation, linear, activation)
                absorbed.add(linear.out)
        elif isinstance(activation, GatedActivation):
            gate, up = producers[activation.gate], producers[activation.up]
            if not (isinstance(gate, Slice) and isinstance(up, Slice) and gate.x == up.x):
                continue
            linear, width = producers[gate.x], activation.out.width
            are_halves = (gate.start, up.start, gate.x.width) == (0, width, 2 * width) and width % PANEL == 0
            is_read_once = (
                is_read_by(gate.x, gate, up) and is_read_by(gate.out, node) and is_read_by(up.out, node)
            )
            if _is_plain(linear) and are_halves and is_read_once:
                fused[node.out] = _fuse(node, LinearGatedActivation, linear, activation)
                absorbed.update((linear.out, gate.out, up.out))
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, QuantizedResult):
            nodes.append(fused.get(node.out, node))
        elif absorbed.isdisjoint(node.outputs()):
            nodes.append(node)
    return Graph(tuple(nodes), dict(graph.outputs))


def _is_plain(node: Node) -> TypeGuard[Linear]:
    """Whether its panels are whole as soon as they are made: an adapter is yet to be added to others."""
    return isinstance(node, Linear) and not isinstance(node, AdaptedLinear)


def _fuse(
    node: QuantizedResult,
    made: type[LinearActivation] | type[LinearGatedActivation],
    linear: Linear,
    activation: Activation | GatedActivation,
) -> QuantizedResult:
    producer = made(
        x=linear.x, weight=linear.weight, bias=linear.bias, kind=activation.kind, out=activation.out
    )
    return replace(node, producer=producer)
