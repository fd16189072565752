"""T5 (arXiv 1910.10683) and T5 v1.1: an encoder and a decoder, pre-norm, whose attention knows positions by a
relative bias alone; scores are not scaled.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fastserve.errors import UnsupportedError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Parameter, RelativeBias, Value
from fastserve.models.config import EncoderDecoderConfig
from fastserve.models.config_value import (
    read_activation,
    read_count,
    read_eps,
    read_flag,
    refuse,
    require,
)
from fastserve.types import JsonObject

_NUM_BUCKETS, _MAX_DISTANCE = 32, 128  # where a config does not say
_USUAL_CONTEXT = 512  # what T5 was trained on; its buckets have no end


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config(EncoderDecoderConfig):
    """A T5 of either version."""

    intermediate_size: int
    is_gated: bool
    num_buckets: int
    max_distance: int
    scales_logits: bool  # by d_model ** -0.5, as the first version has it, whose head is the embedding
    has_own_head: bool  # where no checkpoint says


def read_t5(config: JsonObject) -> T5Config:
    """Read the config of a T5. Raises as `fastserve.models.family.read_config`."""
    require(config, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    refuse(config, "is_encoder_decoder", True)
    num_layers = read_count(config, "num_layers")
    gate, activation = _read_projection(config)
    is_tied = read_flag(config, "tie_word_embeddings", default=True)
    num_buckets = read_count(config, "relative_attention_num_buckets", default=_NUM_BUCKETS)
    max_distance = read_count(config, "relative_attention_max_distance", default=_MAX_DISTANCE)
    if num_buckets % 4 or max_distance <= num_buckets // 2:
        raise UnsupportedError(
            f"the model's config has {num_buckets} buckets for relative positions up to {max_distance}",
            hint="supported are a multiple of 4 of them, and distances beyond half of them",
        )
    # gelu is gelu_new where it gates, as transformers has it for the checkpoints of version 1.1.
    named = "gelu_new" if gate and activation == "gelu" else activation
    return T5Config(
        model_type="t5",
        vocab_size=read_count(config, "vocab_size"),
        hidden_size=read_count(config, "d_model"),
        intermediate_size=read_count(config, "d_ff"),
        num_encoder_layers=num_layers,
        num_decoder_layers=read_count(config, "num_decoder_layers", default=num_layers),
        num_heads=read_count(config, "num_heads"),
        head_dim=read_count(config, "d_kv"),
        activation=read_activation({"feed_forward_proj": named}, default="relu", key="feed_forward_proj"),
        norm_eps=read_eps({"layer_norm_epsilon": 1e-6, **config}, "layer_norm_epsilon"),
        usual_context=read_count(config, "n_positions", default=_USUAL_CONTEXT),
        is_gated=gate,
        num_buckets=num_buckets,
        max_distance=max_distance,
        # transformers before version 5 said both by tie_word_embeddings.
        scales_logits=read_flag(config, "scale_decoder_outputs", default=is_tied),
        has_own_head=not is_tied,
    )


def _read_projection(config: JsonObject) -> tuple[bool, str]:
    """Whether the MLP is gated, and the name of its activation."""
    named = config.get("feed_forward_proj")
    gate, _, activation = str("relu" if named is None else named).rpartition("-")
    if gate not in ("", "gated"):
        raise UnsupportedError(
            f"the model's config has feed_forward_proj={named!r}, which is not supported",
            hint="supported are the name of an activation, and that behind gated-",
        )
    return gate == "gated", activation


def build_t5_encoder(config: T5Config, tensor_names: Collection[str] = ()) -> Graph:
    """The graph that stores the keys and values of a source for `build_t5_decoder`."""
    stack = _Stack(config, "encoder", tensor_names)
    x = stack.embed()
    for index in range(config.num_encoder_layers):
        name = f"encoder.block.{index}.layer"
        x = stack.attend(x, f"{name}.0", index, causal=False)
        x = stack.transform(x, f"{name}.1")
    x = stack.norm(x, "encoder.final_layer_norm")
    for index in range(config.num_decoder_layers):
        name = f"decoder.block.{index}.layer.1.EncDecAttention"
        k, v = (stack.project(x, f"{name}.{part}") for part in "kv")
        stack.b.store_source(k, v, layer_index=index, head_dim=config.head_dim)
    return stack.b.finish()


def build_t5_decoder(config: T5Config, tensor_names: Collection[str] = ()) -> Graph:
    """The graph of a target's tokens: its output is `logits` [output rows, vocab_size]."""
    stack = _Stack(config, "decoder", tensor_names)
    b, x = stack.b, stack.embed()
    for index in range(config.num_decoder_layers):
        name = f"decoder.block.{index}.layer"
        x = stack.attend(x, f"{name}.0", index, causal=True)
        q = stack.project(stack.norm(x, f"{name}.1.layer_norm"), f"{name}.1.EncDecAttention.q")
        attended = b.cross_attention(q, layer_index=index, head_dim=config.head_dim, scale=1.0)
        x = b.add(x, stack.project_back(attended, f"{name}.1.EncDecAttention.o"))
        x = stack.transform(x, f"{name}.2")
    x = stack.norm(x, "decoder.final_layer_norm")
    if config.scales_logits:
        x = b.scale(x, config.hidden_size**-0.5)
    has_own_head = "lm_head.weight" in tensor_names if tensor_names else config.has_own_head
    head = "lm_head.weight" if has_own_head else stack.embedding
    return b.finish(logits=b.gather_rows(b.linear(x, head, width=config.vocab_size)))


class _Stack:
    """Builds the layers of an encoder or of a decoder, part by part."""

    def __init__(self, config: T5Config, name: str, tensor_names: Collection[str]) -> None:
        self.b = GraphBuilder()
        self._config = config
        shared, own = "shared.weight", f"{name}.embed_tokens.weight"  # the same table
        self.embedding = own if own in tensor_names and shared not in tensor_names else shared
        bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # for all layers
        self._bias = RelativeBias(
            Parameter((bias,), (config.num_buckets, config.num_heads)),
            max_distance=config.max_distance,
            bidirectional=name == "encoder",
        )

    def embed(self) -> Value:
        config = self._config
        return self.b.embedding("token_ids", self.embedding, size=config.vocab_size, width=config.hidden_size)

    def norm(self, x: Value, name: str) -> Value:
        return self.b.rms_norm(x, f"{name}.weight", eps=self._config.norm_eps)

    def project(self, x: Value, name: str) -> Value:
        """To queries, keys or values."""
        return self.b.linear(x, f"{name}.weight", width=self._config.num_heads * self._config.head_dim)

    def project_back(self, x: Value, name: str) -> Value:
        return self.b.linear(x, f"{name}.weight", width=self._config.hidden_size)

    def attend(self, x: Value, name: str, layer_index: int, *, causal: bool) -> Value:
        """Norm and attention over the texts themselves, added to x."""
        normed = self.norm(x, f"{name}.layer_norm")
        q, k, v = (self.project(normed, f"{name}.SelfAttention.{part}") for part in "qkv")
        attended = self.b.attention(
            q,
            k,
            v,
            layer_index=layer_index,
            head_dim=self._config.head_dim,
            scale=1.0,
            causal=causal,
            bias=self._bias,
        )
        return self.b.add(x, self.project_back(attended, f"{name}.SelfAttention.o"))

    def transform(self, x: Value, name: str) -> Value:
        """Norm and MLP, added to x."""
        b, config = self.b, self._config
        normed, name = self.norm(x, f"{name}.layer_norm"), f"{name}.DenseReluDense"
        width = config.intermediate_size
        if config.is_gated:
            gate, up = (b.linear(normed, f"{name}.wi_{index}.weight", width=width) for index in (0, 1))
            hidden = b.gated_activation(gate, up, config.activation)
        else:
            hidden = b.activation(b.linear(normed, f"{name}.wi.weight", width=width), config.activation)
        return b.add(x, self.project_back(hidden, f"{name}.wo"))
