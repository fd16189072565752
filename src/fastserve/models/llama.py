"""Llama (arXiv 2302.13971, 2407.21783) and what is made like it: pre-norm decoder, rotary positions, grouped
queries, gated MLP. Families that differ by data (Mistral, Qwen, Gemma, ...) read their configs into this one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Value
from fastserve.models.config import DecoderConfig
from fastserve.models.config_value import (
    check_divides,
    read_activation,
    read_count,
    read_eps,
    read_flag,
    refuse,
    require,
)
from fastserve.models.rope import DEFAULT_THETA, RopeTables, read_rope
from fastserve.types import JsonObject

SLIDING, FULL = "sliding_attention", "full_attention"  # `layer_types` of transformers


@dataclass(frozen=True, slots=True)
class Experts:
    """MLPs of which a router chooses some for each token.

    Attributes:
        width: of each.
        has_normalized_shares: whether the shares of those that are chosen add up to 1.
        shared_width: of one more MLP, which all tokens go through, in shares that a gate of its own gives.
        module: the name of the whole within a layer.
        parts: names of gate, up and down projection within an expert.
    """

    count: int
    num_chosen: int
    width: int
    has_normalized_shares: bool
    shared_width: int | None = None
    module: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Layer:
    """What may differ from layer to layer."""

    rope: RopeTables | None  # None: positions are not told
    window: int | None = None  # position p attends to p - window + 1 .. p
    experts: Experts | None = None  # in place of an MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """A decoder of the Llama kind."""

    intermediate_size: int
    layers: tuple[Layer, ...]  # at least num_layers
    query_scale: float  # of scores
    has_qkv_bias: bool = False
    has_output_bias: bool = False  # of attention
    has_mlp_bias: bool = False
    has_qk_norm: bool = False  # every head of queries and keys is normed
    has_output_norms: bool = False  # what attention and MLP give is normed before it is added
    is_fused: bool = False  # q/k/v and gate/up are one matrix each
    norm_offset: float = 0.0  # added to the weights of norms
    embedding_scale: float = 1.0
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None

    @property
    def usual_context(self) -> int:
        lengths = (layer.rope.usual_context for layer in self.layers if layer.rope)
        return min((length for length in lengths if length), default=self.max_context)

    def for_context(self, context_length: int) -> Self:
        layers = tuple(
            replace(layer, rope=layer.rope and layer.rope.for_context(context_length))
            for layer in self.layers
        )
        return replace(self, layers=layers)


def read_llama(config: JsonObject) -> LlamaConfig:
    """Read the config of a Llama model. Raises as `fastserve.models.family.read_config`."""
    refuse(config, "sliding_window", None)
    model = read_llama_kind(config)
    has_bias = read_flag(config, "attention_bias")
    return replace(
        model,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        has_mlp_bias=read_flag(config, "mlp_bias"),
    )


def read_llama_kind(
    config: JsonObject,
    *,
    default_theta: float = DEFAULT_THETA,
    activation_key: str = "hidden_act",
    partial_rotary: float | None = None,
    is_usually_tied: bool = False,
) -> LlamaConfig:
    """What is read alike in all families of the kind; biases and windows are not.

    A config leaves out what its family has by default, such as a head that is tied to the embedding.
    `partial_rotary` is as `partial` of `read_rope`.
    """
    require(
        config,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    )
    hidden_size = read_count(config, "hidden_size")
    num_heads = read_count(config, "num_attention_heads")
    num_kv_heads = read_count(config, "num_key_value_heads", default=num_heads)
    check_divides("num_key_value_heads", num_kv_heads, "num_attention_heads", num_heads)
    if config.get("head_dim") is None:
        check_divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    head_dim = read_count(config, "head_dim", default=hidden_size // num_heads)
    num_layers = read_count(config, "num_hidden_layers")
    rope = read_rope(config, head_dim, default_theta=default_theta, partial=partial_rotary)
    return LlamaConfig(
        model_type=str(config.get("model_type", "llama")),
        vocab_size=read_count(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read_count(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        activation=read_activation(config, default="silu", key=activation_key),
        norm_eps=read_eps(config, "rms_norm_eps"),
        max_context=read_count(config, "max_position_embeddings"),
        tie_word_embeddings=read_flag(config, "tie_word_embeddings", default=is_usually_tied),
        layers=(Layer(rope),) * num_layers,
        query_scale=head_dim**-0.5,
    )


def with_windows(model: LlamaConfig, windows: Sequence[int | None]) -> LlamaConfig:
    """The model with a window for each layer; one that holds the whole context is none."""
    layers = (
        replace(layer, window=window if window is not None and window < model.max_context else None)
        for layer, window in zip(model.layers, windows, strict=True)
    )
    return replace(model, layers=tuple(layers))


def read_layer_types(config: JsonObject, default: Sequence[str]) -> list[str]:
    """The kind of attention of each layer; `default` where the config does not say.

    Raises:
        CheckpointError: there is not one for each layer.
        UnsupportedError: a kind that we do not compute.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return list(default)
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise CheckpointError(f"the model's config needs layer_types for each of its {len(default)} layers")
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise UnsupportedError(
                f"the model's config has layer_types with {kind!r}, which is not supported",
                hint=f"supported are {FULL}, {SLIDING}",
            )
    return kinds


def build_llama(config: LlamaConfig, tensor_names: Collection[str] = ()) -> Graph:
    """The graph of `LlamaForCausalLM`: its output is `logits` [output rows, vocab_size].

    `tensor_names` are those of the checkpoint: its language model may be a part of a larger one.
    """
    return _Builder(config, tensor_names).build()


# Of the language model: alone; within a model for several kinds of input; the same, as older files have it.
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")


class _Builder:
    def __init__(self, config: LlamaConfig, tensor_names: Collection[str]) -> None:
        self.config = config
        self.b = GraphBuilder()
        has_embedding = (p for p in _PREFIXES if f"{p}embed_tokens.weight" in tensor_names)
        self.prefix = next(has_embedding, _PREFIXES[0])
        self.head = "language_model.lm_head.weight" if self.prefix == _PREFIXES[2] else "lm_head.weight"

    def build(self) -> Graph:
        b, config = self.b, self.config
        embedding = f"{self.prefix}embed_tokens.weight"
        x = b.embedding(
            "token_ids",
            embedding,
            size=config.vocab_size,
            width=config.hidden_size,
            scale=config.embedding_scale,
        )
        for layer_index in range(config.num_layers):
            x = self.layer(x, layer_index)
        x = self.norm(x, f"{self.prefix}norm")
        head = embedding if config.tie_word_embeddings else self.head
        logits = b.gather_rows(b.linear(x, head, width=config.vocab_size))
        if config.logits_soft_cap is not None:
            logits = b.soft_cap(logits, config.logits_soft_cap)
        return b.finish(logits=logits)

    def layer(self, x: Value, layer_index: int) -> Value:
        name = f"{self.prefix}layers.{layer_index}"
        before_mlp = (
            "pre_feedforward_layernorm" if self.config.has_output_norms else "post_attention_layernorm"
        )
        attended = self.attention(self.norm(x, f"{name}.input_layernorm"), layer_index, f"{name}.self_attn")
        if self.config.has_output_norms:
            attended = self.norm(attended, f"{name}.post_attention_layernorm")
        x = self.b.add(x, attended)
        normed = self.norm(x, f"{name}.{before_mlp}")
        experts = self.config.layers[layer_index].experts
        hidden = (
            self.mlp(normed, f"{name}.mlp", self.config.intermediate_size)
            if experts is None
            else self.mixture(normed, f"{name}.{experts.module}", experts)
        )
        if self.config.has_output_norms:
            hidden = self.norm(hidden, f"{name}.post_feedforward_layernorm")
        return self.b.add(x, hidden)

    def norm(self, x: Value, name: str, *, group: int | None = None) -> Value:
        config = self.config
        return self.b.rms_norm(
            x, f"{name}.weight", eps=config.norm_eps, offset=config.norm_offset, group=group
        )

    def project(self, x: Value, name: str, width: int, *, has_bias: bool) -> Value:
        return self.b.linear(x, f"{name}.weight", bias=f"{name}.bias" if has_bias else None, width=width)

    def project_each(
        self, x: Value, names: Sequence[str], widths: Sequence[int], fused: str, *, has_bias: bool
    ) -> list[Value]:
        """Several projections of x, which are stored as one matrix where the config says so."""
        if not self.config.is_fused:
            return [
                self.project(x, name, width, has_bias=has_bias)
                for name, width in zip(names, widths, strict=True)
            ]
        whole = self.project(x, fused, sum(widths), has_bias=has_bias)
        starts = [sum(widths[:index]) for index in range(len(widths))]
        return [self.b.slice(whole, start, width=width) for start, width in zip(starts, widths, strict=True)]

    def attention(self, x: Value, layer_index: int, name: str) -> Value:
        b, config, head_dim = self.b, self.config, self.config.head_dim
        layer = config.layers[layer_index]
        q, k, v = self.project_each(
            x,
            [f"{name}.{part}_proj" for part in "qkv"],
            [config.num_heads * head_dim, *[config.num_kv_heads * head_dim] * 2],
            f"{name}.qkv_proj",
            has_bias=config.has_qkv_bias,
        )
        if config.has_qk_norm:
            q = self.norm(q, f"{name}.q_norm", group=head_dim)
            k = self.norm(k, f"{name}.k_norm", group=head_dim)
        if layer.rope is not None:
            q = b.rope(q, layer.rope.usual, head_dim=head_dim)
            k = b.rope(k, layer.rope.usual, head_dim=head_dim)
        attended = b.attention(
            q,
            k,
            v,
            layer_index=layer_index,
            head_dim=head_dim,
            scale=config.query_scale,
            causal=True,
            window=layer.window,
            soft_cap=config.attention_soft_cap,
        )
        return self.project(attended, f"{name}.o_proj", config.hidden_size, has_bias=config.has_output_bias)

    def mixture(self, x: Value, name: str, experts: Experts) -> Value:
        b = self.b
        gates, ups, downs = (
            [f"{name}.experts.{index}.{part}.weight" for index in range(experts.count)]
            for part in experts.parts
        )
        mixed = b.mixture_of_experts(
            x,
            f"{name}.gate.weight",
            gates,
            ups,
            downs,
            inner_width=experts.width,
            top_k=experts.num_chosen,
            normalized=experts.has_normalized_shares,
            kind=self.config.activation,
        )
        if experts.shared_width is None:
            return mixed
        shared = self.mlp(x, f"{name}.shared_expert", experts.shared_width)
        share = b.linear(x, f"{name}.shared_expert_gate.weight", width=1)
        return b.add(mixed, b.gated_activation(share, shared, "sigmoid"))

    def mlp(self, x: Value, name: str, width: int) -> Value:
        config = self.config
        gate, up = self.project_each(
            x,
            [f"{name}.gate_proj", f"{name}.up_proj"],
            [width] * 2,
            f"{name}.gate_up_proj",
            has_bias=config.has_mlp_bias,
        )
        hidden = self.b.gated_activation(gate, up, config.activation)
        return self.project(hidden, f"{name}.down_proj", config.hidden_size, has_bias=config.has_mlp_bias)
