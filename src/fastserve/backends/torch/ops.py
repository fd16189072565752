"""One function an op, in the plainest torch there is: the definitions that kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from fastserve.backends.relative_bias import bucket_of_distances
from fastserve.backends.torch.step import SequenceRows, Step
from fastserve.graph.node import (
    Activation,
    ActivationKind,
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
    L2Normalize,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    Node,
    Pool,
    PoolKind,
    RelativeBias,
    RmsNorm,
    Rope,
    Scale,
    Slice,
    SoftCap,
    StoreSource,
)

_ACTIVATIONS: Mapping[ActivationKind, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def embedding(node: Embedding, step: Step) -> None:
    step.values[node.out] = step.weights[node.weight][step.ids[node.ids] + node.offset] * node.scale


def linear(node: Linear, step: Step) -> None:
    bias = step.weights[node.bias] if node.bias else None
    step.values[node.out] = functional.linear(step.values[node.x], step.weights[node.weight], bias)


def adapter_down(node: AdapterDown, step: Step) -> None:
    x = step.values[node.x]
    out = x.new_zeros(x.shape[0], node.out.width)
    for rows, adapter in step.adapters_of(node.weight, node.out.rows):
        low = functional.linear(x[rows], adapter.down)
        out[rows, : low.shape[1]] = low
    step.values[node.out] = out


def adapted_linear(node: AdaptedLinear, step: Step) -> None:
    linear(node, step)
    out, low = step.values[node.out], step.values[node.low]
    for rows, adapter in step.adapters_of(node.weight, node.out.rows):
        for part in adapter.parts:
            ranks = slice(part.first_rank, part.first_rank + part.up.shape[1])
            columns = slice(part.first_row, part.first_row + part.up.shape[0])
            if part.factors is not None and part.shifts is not None:
                out[rows, columns] = part.factors * out[rows, columns] + part.shifts
            out[rows, columns] += functional.linear(low[rows, ranks], part.up)


def rms_norm(node: RmsNorm, step: Step) -> None:
    step.values[node.out] = _rms_norm(step.values[node.x], node, step)


def layer_norm(node: LayerNorm, step: Step) -> None:
    step.values[node.out] = _layer_norm(step.values[node.x], node, step)


def add(node: Add, step: Step) -> None:
    step.values[node.out] = step.values[node.x] + step.values[node.y]


def add_rms_norm(node: AddRmsNorm, step: Step) -> None:
    total = step.values[node.x] + step.values[node.y]
    if node.out_sum:
        step.values[node.out_sum] = total
    step.values[node.out] = _rms_norm(total, node, step)


def add_layer_norm(node: AddLayerNorm, step: Step) -> None:
    total = step.values[node.x] + step.values[node.y]
    if node.out_sum:
        step.values[node.out_sum] = total
    step.values[node.out] = _layer_norm(total, node, step)


def rope(node: Rope, step: Step) -> None:
    table = node.table
    x = _split_heads(step.values[node.x], node.head_dim)
    frequencies = torch.tensor(table.inverse_frequencies, dtype=torch.float32, device=x.device)
    positions = (step.ids["positions"] + table.offset).float()
    angles = positions[:, None, None] * frequencies  # [tokens, 1, dim / 2]
    cos, sin = angles.cos() * table.scale, angles.sin() * table.scale
    half = table.dim // 2
    low, high, rest = x[..., :half], x[..., half : table.dim], x[..., table.dim :]
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=2)
    step.values[node.out] = turned.flatten(1)


def attention(node: Attention, step: Step) -> None:
    layer = step.kv[node.pool_layer]
    q, k, v = (_split_heads(step.values[value], node.head_dim) for value in (node.q, node.k, node.v))
    for sequence in step.sequences:
        rows = slice(sequence.start, sequence.stop)
        written = sequence.slots[-sequence.num_rows :]
        layer.store(written, k[rows], v[rows])
    attended = [_attend(node, q[s.start : s.stop], s, step) for s in step.sequences]
    step.values[node.out] = torch.cat(attended).flatten(1)


def store_source(node: StoreSource, step: Step) -> None:
    k, v = (_split_heads(step.values[value], node.head_dim) for value in (node.k, node.v))
    for sequence in step.sequences:
        rows = slice(sequence.start, sequence.stop)
        step.kv[node.pool_layer].store(sequence.slots, k[rows], v[rows])


def cross_attention(node: CrossAttention, step: Step) -> None:
    layer = step.kv[node.pool_layer]
    q = _split_heads(step.values[node.q], node.head_dim)
    group = node.num_heads // node.num_kv_heads
    attended = []
    for sequence in step.sequences:
        k = layer.keys[sequence.source_slots].float().repeat_interleave(group, dim=1)
        v = layer.values[sequence.source_slots].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[sequence.start : sequence.stop], k) * node.scale
        attended.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=2), v))
    step.values[node.out] = torch.cat(attended).flatten(1)


def activation(node: Activation, step: Step) -> None:
    step.values[node.out] = _ACTIVATIONS[node.kind](step.values[node.x])


def gated_activation(node: GatedActivation, step: Step) -> None:
    step.values[node.out] = _ACTIVATIONS[node.kind](step.values[node.gate]) * step.values[node.up]


def mixture_of_experts(node: MixtureOfExperts, step: Step) -> None:
    x = step.values[node.x]
    shares = functional.linear(x, step.weights[node.router]).softmax(dim=1)
    shares, experts = shares.topk(node.top_k, dim=1)  # [rows, top_k]
    if node.normalized:
        shares = shares / shares.sum(dim=1, keepdim=True)
    out = torch.zeros_like(x)
    for index, (gate, up, down) in enumerate(zip(node.gates, node.ups, node.downs, strict=True)):
        rows, places = torch.where(experts == index)
        gated = _ACTIVATIONS[node.kind](functional.linear(x[rows], step.weights[gate]))
        inner = gated * functional.linear(x[rows], step.weights[up])
        out.index_add_(0, rows, functional.linear(inner, step.weights[down]) * shares[rows, places, None])
    step.values[node.out] = out


def soft_cap(node: SoftCap, step: Step) -> None:
    step.values[node.out] = _soft_cap(step.values[node.x], node.cap)


def scale(node: Scale, step: Step) -> None:
    step.values[node.out] = step.values[node.x] * node.factor


def slice_columns(node: Slice, step: Step) -> None:
    step.values[node.out] = step.values[node.x][:, node.start : node.start + node.out.width]


def gather_rows(node: GatherRows, step: Step) -> None:
    step.values[node.out] = step.values[node.x][step.output_rows]


def pool(node: Pool, step: Step) -> None:
    x = step.values[node.x]
    step.values[node.out] = torch.stack([_POOLS[node.kind](x[s.start : s.stop]) for s in step.sequences])


def l2_normalize(node: L2Normalize, step: Step) -> None:
    step.values[node.out] = functional.normalize(step.values[node.x], dim=1, eps=node.eps)


def _rms_norm(x: torch.Tensor, node: RmsNorm | AddRmsNorm, step: Step) -> torch.Tensor:
    weight = node.offset + step.weights[node.weight]
    groups = x.reshape(
        x.shape[0], x.shape[1] // len(weight), len(weight)
    )  # [rows, groups, columns of a group]
    return (weight * (groups * torch.rsqrt(groups.square().mean(2, keepdim=True) + node.eps))).flatten(1)


def _layer_norm(x: torch.Tensor, node: LayerNorm | AddLayerNorm, step: Step) -> torch.Tensor:
    bias = step.weights[node.bias] if node.bias else None
    return functional.layer_norm(x, (x.shape[1],), step.weights[node.weight], bias, node.eps)


def _soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(x / cap)


def _split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x.reshape(x.shape[0], x.shape[1] // head_dim, head_dim)  # [tokens, heads, head_dim]


def _attend(node: Attention, q: torch.Tensor, sequence: SequenceRows, step: Step) -> torch.Tensor:
    """Attention of one sequence's rows q [rows, num_heads, head_dim] over its context as it is stored."""
    layer = step.kv[node.pool_layer]
    group = node.num_heads // node.num_kv_heads
    k = layer.keys[sequence.slots].float().repeat_interleave(group, dim=1)  # [context, num_heads, head_dim]
    v = layer.values[sequence.slots].float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * node.scale
    if node.soft_cap is not None:
        scores = _soft_cap(scores, node.soft_cap)
    context = torch.arange(len(sequence.slots), device=q.device)
    distances = context - context[-sequence.num_rows :, None]  # [rows, context]: key - query
    if node.bias is not None:
        scores = scores + _relative_bias(node.bias, distances, step)
    if node.causal:
        scores = scores.masked_fill(distances > 0, float("-inf"))
    if node.window is not None:
        is_beyond = distances <= -node.window if node.causal else distances.abs() > node.window
        scores = scores.masked_fill(is_beyond, float("-inf"))
    scores[..., : node.first_key] = float("-inf")
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=2), v)


def _relative_bias(bias: RelativeBias, distances: torch.Tensor, step: Step) -> torch.Tensor:
    """[num_heads, rows, context] of the distances [rows, context]."""
    buckets = torch.as_tensor(bucket_of_distances(bias, distances.cpu().numpy()), device=distances.device)
    return step.weights[bias.weight][buckets].permute(2, 0, 1)


def _mean_of_rows(x: torch.Tensor) -> torch.Tensor:
    return x.mean(0)


def _first_row(x: torch.Tensor) -> torch.Tensor:
    return x[0]


def _last_row(x: torch.Tensor) -> torch.Tensor:
    return x[-1]


_POOLS: Mapping[PoolKind, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": _mean_of_rows,
    "first": _first_row,
    "last": _last_row,
}

OPS: Mapping[type[Node], Callable[[Any, Step], None]] = {
    Embedding: embedding,
    Linear: linear,
    AdapterDown: adapter_down,
    AdaptedLinear: adapted_linear,
    RmsNorm: rms_norm,
    LayerNorm: layer_norm,
    Add: add,
    AddRmsNorm: add_rms_norm,
    AddLayerNorm: add_layer_norm,
    Rope: rope,
    Attention: attention,
    StoreSource: store_source,
    CrossAttention: cross_attention,
    Activation: activation,
    GatedActivation: gated_activation,
    MixtureOfExperts: mixture_of_experts,
    SoftCap: soft_cap,
    Scale: scale,
    Slice: slice_columns,
    GatherRows: gather_rows,
    Pool: pool,
    L2Normalize: l2_normalize,
}
