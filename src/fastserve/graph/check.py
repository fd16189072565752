"""What must hold of every graph. Families and passes are ours, so a violation is a defect: it asserts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastserve.graph.node import (
    Activation,
    AdaptedLinear,
    AdapterDown,
    Add,
    AddLayerNorm,
    AddRmsNorm,
    Attention,
    CrossAttention,
    Embedding,
    GatedActivation,
    GatherRows,
    Graph,
    L2Normalize,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Node,
    Parameter,
    Pool,
    RmsNorm,
    Rope,
    Rows,
    Scale,
    Slice,
    SoftCap,
    StoreSource,
    Value,
)


def check_graph(graph: Graph) -> None:
    """Check that every value is defined once and before its use, and that rows and widths fit in every node.

    Raises:
        AssertionError: with the node's position and what does not fit.
    """
    defined: dict[int, Value] = {}
    for position, node in enumerate(graph.nodes):
        where = f"node {position} ({node.op})"
        for value in node.inputs():
            assert defined.get(value.index) == value, f"{where} reads {value}, which nobody defined before it"
        for value in node.outputs():
            assert value.index not in defined, f"{where} defines value {value.index} a second time"
            assert value.width > 0, f"{where} defines {value}, which has no columns"
            defined[value.index] = value
        assert _FITS[type(node)](node), f"{where} has rows or widths that do not fit: {node}"
    for name, value in graph.outputs.items():
        assert defined.get(value.index) == value, f"output {name} is {value}, which nobody defines"


def _embedding_fits(node: Embedding) -> bool:
    return (
        node.out.rows is Rows.TOKENS
        and _is_matrix(node.weight)
        and node.weight.shape[1] == node.out.width
        and node.offset < node.weight.shape[0]
        and (node.offset >= 0 or node.ids == "positions")
    )


def _linear_fits(node: Linear) -> bool:
    return (
        node.out.rows is node.x.rows
        and node.weight.shape == (node.out.width, node.x.width)
        and (node.bias is None or node.bias.shape == (node.out.width,))
    )


def _adapter_down_fits(node: AdapterDown) -> bool:
    return node.out.rows is node.x.rows and node.weight.shape[1] == node.x.width


def _adapted_linear_fits(node: AdaptedLinear) -> bool:
    return _linear_fits(node) and node.low.rows is node.out.rows


def _rms_norm_fits(node: RmsNorm) -> bool:
    shape = node.weight.shape
    return _is_same_shape(node.x, node.out) and len(shape) == 1 and node.x.width % shape[0] == 0


def _layer_norm_fits(node: LayerNorm) -> bool:
    return _is_same_shape(node.x, node.out) and _are_rows_of(node.out, node.parameters())


def _add_norm_fits(node: AddRmsNorm | AddLayerNorm) -> bool:
    sums = (node.out,) if node.out_sum is None else (node.out, node.out_sum)
    return _is_same_shape(node.x, node.y, *sums) and _are_rows_of(node.out, node.parameters())


def _rope_fits(node: Rope) -> bool:
    table = node.table
    return (
        node.x.rows is Rows.TOKENS
        and _is_same_shape(node.x, node.out)
        and node.x.width % node.head_dim == 0
        and table.dim <= node.head_dim
        and table.dim == 2 * len(table.inverse_frequencies)
    )


def _attention_fits(node: Attention) -> bool:
    return (
        node.q.rows is Rows.TOKENS
        and _is_same_shape(node.q, node.out)
        and _is_same_shape(node.k, node.v)
        and node.k.rows is Rows.TOKENS
        and node.q.width == node.num_heads * node.head_dim
        and node.k.width == node.num_kv_heads * node.head_dim
        and node.num_heads % node.num_kv_heads == 0
        and (node.window is None or node.window >= 1)
        and node.first_key >= 0
        and (node.soft_cap is None or node.soft_cap > 0)
        and (node.bias is None or node.bias.weight.shape[1:] == (node.num_heads,))
    )


def _store_source_fits(node: StoreSource) -> bool:
    is_of_tokens = node.k.rows is Rows.TOKENS and _is_same_shape(node.k, node.v)
    return is_of_tokens and node.k.width == node.num_kv_heads * node.head_dim


def _cross_attention_fits(node: CrossAttention) -> bool:
    return (
        node.q.rows is Rows.TOKENS
        and _is_same_shape(node.q, node.out)
        and node.q.width == node.num_heads * node.head_dim
        and node.num_heads % node.num_kv_heads == 0
    )


def _gated_activation_fits(node: GatedActivation) -> bool:
    is_gate = node.gate.rows is node.up.rows and node.gate.width in (1, node.up.width)
    return is_gate and _is_same_shape(node.up, node.out)


def _mixture_of_experts_fits(node: MixtureOfExperts) -> bool:
    width, inner_width = node.x.width, node.gates[0].shape[0]
    return (
        _is_same_shape(node.x, node.out)
        and node.router.shape == (node.num_experts, width)
        and len(node.gates) == len(node.ups) == len(node.downs)
        and all(p.shape == (inner_width, width) for p in (*node.gates, *node.ups))
        and all(p.shape == (width, inner_width) for p in node.downs)
        and 1 <= node.top_k <= node.num_experts
    )


def _soft_cap_fits(node: SoftCap) -> bool:
    return _elementwise_fits(node) and node.cap > 0


def _slice_fits(node: Slice) -> bool:
    return node.out.rows is node.x.rows and 0 <= node.start <= node.x.width - node.out.width


def _gather_rows_fits(node: GatherRows) -> bool:
    return node.x.rows is Rows.TOKENS and node.out.rows is Rows.OUTPUTS and node.x.width == node.out.width


def _pool_fits(node: Pool) -> bool:
    return node.x.rows is Rows.TOKENS and node.out.rows is Rows.SEQUENCES and node.x.width == node.out.width


def _elementwise_fits(node: Node) -> bool:
    return _is_same_shape(*node.inputs(), *node.outputs())


def _is_same_shape(first: Value, *others: Value) -> bool:
    return all((other.rows, other.width) == (first.rows, first.width) for other in others)


def _are_rows_of(value: Value, parameters: tuple[Parameter, ...]) -> bool:
    return all(parameter.shape == (value.width,) for parameter in parameters)


def _is_matrix(parameter: Parameter) -> bool:
    return len(parameter.shape) == 2


_FITS: Mapping[type[Node], Callable[[Any], bool]] = {
    Embedding: _embedding_fits,
    Linear: _linear_fits,
    AdapterDown: _adapter_down_fits,
    AdaptedLinear: _adapted_linear_fits,
    RmsNorm: _rms_norm_fits,
    LayerNorm: _layer_norm_fits,
    Add: _elementwise_fits,
    AddRmsNorm: _add_norm_fits,
    AddLayerNorm: _add_norm_fits,
    Rope: _rope_fits,
    Attention: _attention_fits,
    StoreSource: _store_source_fits,
    CrossAttention: _cross_attention_fits,
    Activation: _elementwise_fits,
    GatedActivation: _gated_activation_fits,
    MixtureOfExperts: _mixture_of_experts_fits,
    SoftCap: _soft_cap_fits,
    Scale: _elementwise_fits,
    Slice: _slice_fits,
    GatherRows: _gather_rows_fits,
    Pool: _pool_fits,
    L2Normalize: _elementwise_fits,
}
