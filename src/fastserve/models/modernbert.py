"""ModernBERT (arXiv 2412.13663): pre-norm encoder, rotary positions, gated MLP, windows in most layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fastserve.errors import CheckpointError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import ActivationKind, PoolKind, RopeTable, Value
from fastserve.models.config import EncoderConfig
from fastserve.models.config_value import (
    check_divides,
    read_activation,
    read_count,
    read_eps,
    read_flag,
    require,
)
from fastserve.models.head import HeadLayout, HeadLayouts
from fastserve.models.post_norm import find_prefix
from fastserve.models.rope import read_rope
from fastserve.types import JsonObject

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_THETAS = {_GLOBAL: 160_000.0, _LOCAL: 10_000.0}
_OLD_THETA_KEYS = {_GLOBAL: "global_rope_theta", _LOCAL: "local_rope_theta"}  # before transformers 5
_GLOBAL_EVERY, _WINDOW = 3, 128
_CLASSIFIER_POOLS: Mapping[object, PoolKind] = {"cls": "first", "mean": "mean"}


@dataclass(frozen=True, slots=True)
class ModernBertLayer:
    """How a layer attends: within `window` tokens on either side, or to all; and how it turns them."""

    window: int | None
    rope: RopeTable


@dataclass(frozen=True, slots=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    """All but the embedding of words is in `layers`, and in which linears and norms have biases."""

    layers: tuple[ModernBertLayer, ...]
    has_norm_bias: bool
    has_attention_bias: bool
    has_mlp_bias: bool
    has_classifier_bias: bool
    classifier_activation: ActivationKind
    classifier_pool: PoolKind


def read_modernbert(config: JsonObject) -> ModernBertConfig:
    """Read the config of a ModernBERT. Raises as `fastserve.models.family.read_config`."""
    require(
        config,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "norm_eps",
        "max_position_embeddings",
    )
    hidden_size, num_heads = read_count(config, "hidden_size"), read_count(config, "num_attention_heads")
    check_divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    num_layers = read_count(config, "num_hidden_layers")
    pool = config.get("classifier_pooling", "cls")
    if not isinstance(pool, str) or pool not in _CLASSIFIER_POOLS:
        raise CheckpointError(f"the model's config has classifier_pooling={pool!r}; it must be cls or mean")
    return ModernBertConfig(
        model_type=str(config["model_type"]),
        vocab_size=read_count(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read_count(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        activation=read_activation(config, key="hidden_activation", default="gelu"),
        norm_eps=read_eps(config, "norm_eps"),
        max_context=read_count(config, "max_position_embeddings"),
        num_token_types=0,
        layers=_read_layers(config, num_layers, hidden_size // num_heads),
        has_norm_bias=read_flag(config, "norm_bias"),
        has_attention_bias=read_flag(config, "attention_bias"),
        has_mlp_bias=read_flag(config, "mlp_bias"),
        has_classifier_bias=read_flag(config, "classifier_bias"),
        classifier_activation=read_activation(config, key="classifier_activation", default="gelu"),
        classifier_pool=_CLASSIFIER_POOLS[pool],
    )


def modernbert_heads(config: EncoderConfig) -> HeadLayouts:
    """Those of `ModernBertForSequenceClassification` and its like."""
    assert isinstance(config, ModernBertConfig)

    def layout(pool: PoolKind | None) -> HeadLayout:
        return HeadLayout(
            pool=pool,
            dense="head.dense",
            has_dense_bias=config.has_classifier_bias,
            activation=config.classifier_activation,
            norm="head.norm",
            has_norm_bias=config.has_norm_bias,
            norm_eps=config.norm_eps,
        )

    pooled, every_token = layout(config.classifier_pool), layout(None)
    return {
        "sequence-classification": pooled,
        "multiple-choice": pooled,
        "token-classification": every_token,
        "question-answering": every_token,
    }


def encode_modernbert(b: GraphBuilder, config: EncoderConfig, tensor_names: Collection[str]) -> Value:
    """`ModernBertModel`: token vectors [tokens, hidden_size]."""
    assert isinstance(config, ModernBertConfig)
    prefix = find_prefix("model", tensor_names)

    def norm(x: Value, name: str) -> Value:
        bias = f"{prefix}{name}.bias" if config.has_norm_bias else None
        return b.layer_norm(x, f"{prefix}{name}.weight", bias, eps=config.norm_eps)

    words = f"{prefix}embeddings.tok_embeddings.weight"
    x = norm(
        b.embedding("token_ids", words, size=config.vocab_size, width=config.hidden_size), "embeddings.norm"
    )
    for layer_index in range(config.num_layers):
        name = f"layers.{layer_index}"
        normed = norm(x, f"{name}.attn_norm") if layer_index else x  # the first reads what is normed already
        x = b.add(x, _attention(b, config, normed, f"{prefix}{name}.attn", layer_index))
        x = b.add(x, _mlp(b, config, norm(x, f"{name}.mlp_norm"), f"{prefix}{name}.mlp"))
    return norm(x, "final_norm")


def _attention(b: GraphBuilder, config: ModernBertConfig, x: Value, name: str, layer_index: int) -> Value:
    def linear(x: Value, part: str, width: int) -> Value:
        bias = f"{name}.{part}.bias" if config.has_attention_bias else None
        return b.linear(x, f"{name}.{part}.weight", bias=bias, width=width)

    width, layer = config.hidden_size, config.layers[layer_index]
    qkv = linear(x, "Wqkv", 3 * width)
    q, k, v = (b.slice(qkv, part * width, width=width) for part in range(3))
    attended = b.attention(
        b.rope(q, layer.rope, head_dim=config.head_dim),
        b.rope(k, layer.rope, head_dim=config.head_dim),
        v,
        layer_index=layer_index,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        causal=False,
        window=layer.window,
    )
    return linear(attended, "Wo", width)


def _mlp(b: GraphBuilder, config: ModernBertConfig, x: Value, name: str) -> Value:
    def linear(x: Value, part: str, width: int) -> Value:
        bias = f"{name}.{part}.bias" if config.has_mlp_bias else None
        return b.linear(x, f"{name}.{part}.weight", bias=bias, width=width)

    width = config.intermediate_size
    both = linear(x, "Wi", 2 * width)
    gate, up = b.slice(both, 0, width=width), b.slice(both, width, width=width)
    return linear(b.gated_activation(gate, up, config.activation), "Wo", config.hidden_size)


def _read_layers(config: JsonObject, num_layers: int, head_dim: int) -> tuple[ModernBertLayer, ...]:
    """`layer_types` (transformers 5), or `global_attn_every_n_layers` (before)."""
    every = read_count(config, "global_attn_every_n_layers", default=_GLOBAL_EVERY)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [_LOCAL if index % every else _GLOBAL for index in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {_GLOBAL, _LOCAL}:
        raise CheckpointError(
            f"the model's config has layer_types={kinds!s:.80}; it must name {_GLOBAL} or {_LOCAL}"
            f" for each of {num_layers} layers"
        )
    # Of all that a token sees, half is on either side: transformers' ModernBertConfig.sliding_window.
    window = read_count(config, "local_attention", default=_WINDOW) // 2
    layers = {
        _GLOBAL: ModernBertLayer(None, _read_rope(config, _GLOBAL, head_dim)),
        _LOCAL: ModernBertLayer(window, _read_rope(config, _LOCAL, head_dim)),
    }
    return tuple(layers[kind] for kind in kinds)


def _read_rope(config: JsonObject, kind: str, head_dim: int) -> RopeTable:
    """Of one kind of layer: a mapping for each (transformers 5), or its theta and `rope_scaling` (before)."""
    parameters = config.get("rope_parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise CheckpointError(f"the model's rope parameters must be a mapping, not {parameters!r}")
    own = (parameters or {}).get(kind) or config.get("rope_scaling") or {}
    if not isinstance(own, dict):
        raise CheckpointError(f"the model's rope parameters of {kind} must be a mapping, not {own!r}")
    theta = config.get(_OLD_THETA_KEYS[kind], _THETAS[kind])
    return read_rope(config, head_dim, parameters={"rope_theta": theta, **own}).usual
