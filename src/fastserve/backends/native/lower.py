"""Lowers a graph to a native plan: every node becomes the plan's call of the same name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

import fastserve._native as _native
from fastserve.backends.native.chains import Chain
from fastserve.backends.native.fuse_linear_activation import LinearActivation, LinearGatedActivation
from fastserve.backends.native.fuse_quantize_rows import QuantizedResult
from fastserve.backends.native.fuse_rope_attention import RopeAttention
from fastserve.backends.native.quantize_rows import QuantizeRows
from fastserve.backends.native.route_experts import RoutedExperts
from fastserve.backends.native.weights import Weights
from fastserve.backends.relative_bias import bucket_of_distances
from fastserve.graph.memory import MemoryPlan
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
    Node,
    Parameter,
    Pool,
    RelativeBias,
    RmsNorm,
    Rope,
    RopeTable,
    Rows,
    Scale,
    Slice,
    SoftCap,
    StoreSource,
    Value,
)
from fastserve.types import Float32Array

_ROWS: Mapping[Rows, _native.Rows] = {
    Rows.TOKENS: _native.Rows.TOKENS,
    Rows.OUTPUTS: _native.Rows.OUTPUTS,
    Rows.SEQUENCES: _native.Rows.SEQUENCES,
}


@dataclass(frozen=True, slots=True)
class Lowering:
    """What a node needs to become a call: where values lie, the weights, the KV pool, the rotary tables.
    Values that live only within a chain have a place in its strips as well."""

    plan: _native.Plan
    memory: MemoryPlan
    weights: Weights
    kv_pool: _native.KvPool
    rope_tables: Mapping[RopeTable, tuple[_native.FloatTable, _native.FloatTable]]
    bias_tables: Mapping[RelativeBias, _native.FloatTable]
    chains: Sequence[Chain] = ()
    adapter_tables: Mapping[Parameter, _native.AdapterTable] = field(default_factory=dict)

    def quantized(self, value: Value, width: int, group_size: int) -> _native.Matrix:
        """The place of a value that holds quantized rows of `width` columns."""
        return self._matrix(value, width, group_size)

    def matrix(self, value: Value | None) -> _native.Matrix:
        """The value's place in the arena; a matrix without columns where there is no value."""
        if value is None:
            return _native.Matrix(0, 0, 0, _native.Rows.TOKENS)
        return self._matrix(value, value.width, None)

    def expert_rows(self, value: Value, top_k: int, width: int, group_size: int | None) -> _native.Matrix:
        """The place of a value whose rows hold `top_k` rows of `width` columns each, as a matrix of these."""
        place = self.memory.placements[value]
        stride = place.row_stride // top_k
        return _native.Matrix(place.byte_offset, stride, width, _ROWS[value.rows], group_size)

    def _matrix(self, value: Value, width: int, group_size: int | None) -> _native.Matrix:
        place = self.memory.placements[value]
        chains = [chain for chain in self.chains if value in chain.strip.placements]
        strip_offset = chains[0].strip.placements[value].byte_offset if chains else None
        is_in_any_strip = any(value in chain.values for chain in chains if not chain.whole_sequences)
        return _native.Matrix(
            place.byte_offset,
            place.row_stride,
            width,
            _ROWS[value.rows],
            group_size,
            strip_offset,
            needs_whole_sequences=bool(chains) and not is_in_any_strip,
        )


def lower(graph: Graph, to: Lowering) -> None:
    """Add a call for every node of the graph, in order. Slices cost nothing: they are only places."""
    for position, node in enumerate(graph.nodes):
        for chain in to.chains:  # those of sequences first: they have the others within
            if position == chain.nodes.start:
                start = to.plan.start_sequence_chain if chain.whole_sequences else to.plan.start_chain
                start(chain.strip_rows, chain.strip.size_bytes)
        if isinstance(node, QuantizedResult):
            _lower_quantized_result(node, to)
        else:
            _lower_node(node, to, to.matrix)
        for chain in reversed(to.chains):
            if position == chain.nodes.stop - 1:
                to.plan.end_sequence_chain() if chain.whole_sequences else to.plan.end_chain()


def _lower_quantized_result(node: QuantizedResult, to: Lowering) -> None:
    result = node.producer.out
    quantized = to.quantized(node.out, result.width, node.group_size)
    _lower_node(node.producer, to, lambda value: quantized if value == result else to.matrix(value))


def _lower_node(node: Node, to: Lowering, at: Callable[[Value | None], _native.Matrix]) -> None:
    """`at` gives the places of the node's values."""
    plan, vector = to.plan, to.weights.vector
    match node:
        case Embedding():
            ids = getattr(_native.IdSource, node.ids)
            plan.embedding(ids, to.weights.matrix(node.weight), at(node.out), node.offset, node.scale)
        case LinearActivation() | LinearGatedActivation():
            bias = vector(node.bias) if node.bias else None
            is_gated = isinstance(node, LinearGatedActivation)
            call = plan.linear_gated_activation if is_gated else plan.linear_activation
            call(node.kind, at(node.x), to.weights.matrix(node.weight), bias, at(node.out))
        case AdapterDown():
            plan.adapter_down(at(node.x), to.adapter_tables[node.weight], at(node.out))
        case Linear():
            bias = vector(node.bias) if node.bias else None
            plan.linear(at(node.x), to.weights.matrix(node.weight), bias, at(node.out))
            if isinstance(node, AdaptedLinear):
                plan.adapter_up(at(node.low), to.adapter_tables[node.weight], at(node.out))
        case QuantizeRows():
            plan.quantize_rows(at(node.x), to.quantized(node.out, node.x.width, node.group_size))
        case RmsNorm():
            plan.rms_norm(at(node.x), _norm_weight(node, to), node.eps, at(node.out))
        case LayerNorm():
            plan.layer_norm(at(node.x), vector(node.weight), _norm_bias(node, to), node.eps, at(node.out))
        case Add():
            plan.add(at(node.x), at(node.y), at(node.out))
        case AddRmsNorm():
            weight = _norm_weight(node, to)
            plan.add_rms_norm(at(node.x), at(node.y), weight, node.eps, at(node.out_sum), at(node.out))
        case AddLayerNorm():
            weight, bias = vector(node.weight), _norm_bias(node, to)
            x, y, out_sum = at(node.x), at(node.y), at(node.out_sum)
            plan.add_layer_norm(x, y, weight, bias, node.eps, out_sum, at(node.out))
        case Rope():
            cosines, sines = to.rope_tables[node.table]
            plan.rope(at(node.x), cosines, sines, node.table.dim, node.head_dim, at(node.out))
        case RopeAttention():
            cosines, sines = to.rope_tables[node.table]
            q, k, v, dim = at(node.q), at(node.k), at(node.v), node.table.dim
            pool, layer, scores = to.kv_pool, node.pool_layer, _attention_scores(node, to)
            plan.rope_attention(q, k, v, cosines, sines, dim, pool, layer, scores, at(node.out))
        case Attention():
            q, k, v = at(node.q), at(node.k), at(node.v)
            scores = _attention_scores(node, to)
            plan.attention(q, k, v, to.kv_pool, node.pool_layer, scores, at(node.out))
        case StoreSource():
            plan.store_source(at(node.k), at(node.v), to.kv_pool, node.pool_layer)
        case CrossAttention():
            plan.cross_attention(at(node.q), to.kv_pool, node.pool_layer, node.scale, at(node.out))
        case Activation():
            plan.activation(node.kind, at(node.x), at(node.out))
        case GatedActivation():
            plan.gated_activation(node.kind, at(node.gate), at(node.up), at(node.out))
        case RoutedExperts():
            _lower_routed_experts(node, to)
        case SoftCap():
            plan.soft_cap(at(node.x), node.cap, at(node.out))
        case Scale():
            plan.scale(at(node.x), node.factor, at(node.out))
        case GatherRows():
            plan.gather_rows(at(node.x), at(node.out))
        case Pool():
            plan.pool(getattr(_native.PoolKind, node.kind), at(node.x), at(node.out))
        case L2Normalize():
            plan.l2_normalize(at(node.x), node.eps, at(node.out))
        case Slice():
            pass
        case _:
            raise AssertionError(f"{node.op} has no native call")


def _lower_routed_experts(node: RoutedExperts, to: Lowering) -> None:
    matrix, width = to.weights.matrix, node.x.width
    to.plan.linear(to.matrix(node.x), matrix(node.router), None, to.matrix(node.out_logits))
    to.plan.mixture_of_experts(
        node.kind,
        to.matrix(node.x),
        to.matrix(node.out_logits),
        *([matrix(weight) for weight in weights] for weights in (node.gates, node.ups, node.downs)),
        top_k=node.top_k,
        normalized=node.normalized,
        gathered=to.expert_rows(node.out_gathered, node.top_k, width, node.gathered_group_size),
        inner=to.expert_rows(node.out_inner, node.top_k, node.gates[0].shape[0], node.inner_group_size),
        results=to.expert_rows(node.out_results, node.top_k, width, None),
        out=to.matrix(node.out),
    )


def _attention_scores(node: Attention, to: Lowering) -> _native.AttentionScores:
    before = node.window
    if node.window is not None and node.causal:
        before = node.window - 1  # the row's own key is within the window
    return _native.AttentionScores(
        node.scale,
        keys_before=before,
        keys_after=0 if node.causal else node.window,
        soft_cap=node.soft_cap,
        bias=to.bias_tables[node.bias] if node.bias else None,
        first_key=node.first_key,
    )


def _norm_weight(node: RmsNorm | AddRmsNorm, to: Lowering) -> Float32Array:
    return to.weights.vector(node.weight) + np.float32(node.offset)


def _norm_bias(node: LayerNorm | AddLayerNorm, to: Lowering) -> Float32Array:
    return to.weights.vector(node.bias) if node.bias else np.zeros(node.x.width, np.float32)


def make_rope_table(table: RopeTable, max_context: int) -> tuple[_native.FloatTable, _native.FloatTable]:
    """Cosines and sines [max_context, dim / 2] of positions from 0 on, from float32 angles as transformers
    computes them."""
    positions = np.arange(table.offset, table.offset + max_context, dtype=np.float32)
    angles = positions[:, None] * np.asarray(table.inverse_frequencies, dtype=np.float32)
    scale = np.float32(table.scale)
    cosines, sines = np.cos(angles) * scale, np.sin(angles) * scale
    return _native.FloatTable(cosines.ravel()), _native.FloatTable(sines.ravel())


def make_bias_table(bias: RelativeBias, weights: Weights, max_context: int) -> _native.FloatTable:
    """What each head adds to scores, by distance (key position - query position): [num_heads, distances], all
    that there are within a context."""
    distances = np.arange(1 - max_context, max_context)
    by_bucket = weights.vector(bias.weight).reshape(bias.weight.shape)
    by_distance = by_bucket[bucket_of_distances(bias, distances)].T  # [num_heads, distances]
    padded = np.pad(by_distance, ((0, 0), (0, _native.BIAS_PADDING)))
    return _native.FloatTable(padded.ravel())
