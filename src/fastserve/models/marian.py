"""Marian (arXiv 1804.00344), the translators of OPUS-MT: the Transformer of arXiv 1706.03762, post-norm, with
sinusoidal positions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor, TensorFormat
from fastserve.errors import CheckpointError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Value
from fastserve.models.config import EncoderDecoderConfig
from fastserve.models.config_value import (
    check_divides,
    read_activation,
    read_count,
    read_flag,
    refuse,
    require,
)
from fastserve.types import Float32Array, JsonObject

_EMBEDDING = "model.shared.weight"
_HEAD = "lm_head.weight"
_POSITIONS = "model.encoder.embed_positions.weight"  # of both; checkpoints have it or leave it out
_BIAS = "final_logits_bias"
_NORM_EPS = 1e-5  # of torch.nn.LayerNorm, which a config does not name


@dataclass(frozen=True, slots=True, kw_only=True)
class MarianConfig(EncoderDecoderConfig):
    """A translator of the Marian kind."""

    encoder_intermediate_size: int
    decoder_intermediate_size: int
    scales_embedding: bool
    has_own_head: bool  # else it is the embedding of the target's tokens

    @property
    def embedding_scale(self) -> float:
        return float(self.hidden_size**0.5) if self.scales_embedding else 1.0


def read_marian(config: JsonObject) -> MarianConfig:
    """Read the config of a Marian model. Raises as `fastserve.models.family.read_config`."""
    require(
        config,
        "vocab_size",
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "max_position_embeddings",
    )
    vocab_size = read_count(config, "vocab_size")
    refuse(config, "is_encoder_decoder", True)
    is_shared = read_flag(config, "share_encoder_decoder_embeddings", default=True)
    if is_shared:
        refuse(config, "tie_word_embeddings", True)
        refuse(config, "decoder_vocab_size", vocab_size)
    refuse(config, "normalize_before", False)
    refuse(config, "add_final_layer_norm", False)
    refuse(config, "normalize_embedding", False)
    refuse(config, "static_position_embeddings", True)
    hidden_size, num_heads = read_count(config, "d_model"), read_count(config, "encoder_attention_heads")
    check_divides("encoder_attention_heads", num_heads, "d_model", hidden_size)
    refuse(config, "decoder_attention_heads", num_heads)
    max_context = read_count(config, "max_position_embeddings")
    return MarianConfig(
        model_type="marian",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        encoder_intermediate_size=read_count(config, "encoder_ffn_dim"),
        decoder_intermediate_size=read_count(config, "decoder_ffn_dim"),
        num_encoder_layers=read_count(config, "encoder_layers"),
        num_decoder_layers=read_count(config, "decoder_layers"),
        num_heads=num_heads,
        head_dim=hidden_size // num_heads,
        activation=read_activation(config, default="gelu", key="activation_function"),
        norm_eps=_NORM_EPS,
        usual_context=max_context,
        max_context=max_context,
        scales_embedding=read_flag(config, "scale_embedding"),
        own_target_vocab_size=None
        if is_shared
        else read_count(config, "decoder_vocab_size", default=vocab_size),
        has_own_head=not read_flag(config, "tie_word_embeddings", default=True),
    )


def arrange_marian(config: MarianConfig, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensors, with the bias of the logits as a vector and the table of positions, which is computed.

    Raises:
        CheckpointError: the bias has another shape.
    """
    arranged = {name: tensor for name, tensor in tensors.items() if "embed_positions" not in name}
    arranged[_POSITIONS] = ComputedTensor(
        _POSITIONS,
        TensorFormat.F32,
        (config.max_context, config.hidden_size),
        lambda begin, end: sinusoids(begin, end, config.hidden_size).reshape(-1).view(np.uint8),
    )
    bias = tensors.get(_BIAS)
    if bias is not None:
        if bias.shape != (1, config.target_vocab_size):
            raise CheckpointError(
                f"{_BIAS} has shape {list(bias.shape)}, [1, {config.target_vocab_size}] was expected",
                hint="take the model from its source again, config and weights together",
            )
        arranged[_BIAS] = StoredTensor(_BIAS, bias.format, (config.target_vocab_size,), bias.data)
    return arranged


def sinusoids(begin: int, end: int, width: int) -> Float32Array:
    """Positions begin .. end as [positions, width] (arXiv 1706.03762, section 3.5): all sines, then all
    cosines, of the position times 10000 ** (-2 i / width).

    >>> sinusoids(0, 1, 4).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    columns = np.arange(width)
    angles = np.arange(begin, end)[:, None] / np.power(10000, 2 * (columns // 2) / width)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)


def build_marian_encoder(config: MarianConfig, tensor_names: Collection[str] = ()) -> Graph:
    """The graph that stores the keys and values of a source for `build_marian_decoder`."""
    stack = _Stack(config)
    embedding = "model.encoder.embed_tokens.weight" if config.has_two_vocabularies else _EMBEDDING
    x = stack.embed(embedding, config.vocab_size)
    for index in range(config.num_encoder_layers):
        name = f"model.encoder.layers.{index}"
        x = stack.attend(x, name, index, causal=False)
        x = stack.transform(x, name, config.encoder_intermediate_size)
    for index in range(config.num_decoder_layers):
        name = f"model.decoder.layers.{index}.encoder_attn"
        k, v = (stack.linear(x, f"{name}.{part}_proj") for part in "kv")
        stack.b.store_source(k, v, layer_index=index, head_dim=config.head_dim)
    return stack.b.finish()


def build_marian_decoder(config: MarianConfig, tensor_names: Collection[str] = ()) -> Graph:
    """The graph of `MarianMTModel`'s decoder: its output is `logits` [output rows, vocab_size]."""
    stack = _Stack(config)
    embedding, head = _target_matrices(config, tensor_names)
    b, x = stack.b, stack.embed(embedding, config.target_vocab_size)
    for index in range(config.num_decoder_layers):
        name = f"model.decoder.layers.{index}"
        x = stack.attend(x, name, index, causal=True)
        q = stack.linear(x, f"{name}.encoder_attn.q_proj")
        attended = b.cross_attention(
            q, layer_index=index, head_dim=config.head_dim, scale=config.head_dim**-0.5
        )
        x = stack.add_and_norm(
            x, stack.linear(attended, f"{name}.encoder_attn.out_proj"), f"{name}.encoder_attn_layer_norm"
        )
        x = stack.transform(x, name, config.decoder_intermediate_size)
    logits = b.linear(x, head, bias=_BIAS, width=config.target_vocab_size)
    return b.finish(logits=b.gather_rows(logits))


def _target_matrices(config: MarianConfig, tensor_names: Collection[str]) -> tuple[str, str]:
    """The embedding of a target's tokens, and the head; a checkpoint has those that are one under either
    name."""
    if not config.has_two_vocabularies:
        return _EMBEDDING, _EMBEDDING
    embedding = "model.decoder.embed_tokens.weight"
    if config.has_own_head:
        return embedding, _HEAD
    only = _HEAD if _HEAD in tensor_names and embedding not in tensor_names else embedding
    return only, only


class _Stack:
    """Builds the layers of an encoder or of a decoder, part by part."""

    def __init__(self, config: MarianConfig) -> None:
        self.b = GraphBuilder()
        self._config = config

    def embed(self, embedding: str, vocab_size: int) -> Value:
        b, config = self.b, self._config
        words = b.embedding(
            "token_ids",
            embedding,
            size=vocab_size,
            width=config.hidden_size,
            scale=config.embedding_scale,
        )
        return b.add(
            words, b.embedding("positions", _POSITIONS, size=config.max_context, width=config.hidden_size)
        )

    def linear(self, x: Value, name: str, width: int | None = None) -> Value:
        width = self._config.hidden_size if width is None else width
        return self.b.linear(x, f"{name}.weight", bias=f"{name}.bias", width=width)

    def add_and_norm(self, x: Value, y: Value, norm: str) -> Value:
        return self.b.layer_norm(
            self.b.add(x, y), f"{norm}.weight", f"{norm}.bias", eps=self._config.norm_eps
        )

    def attend(self, x: Value, name: str, layer_index: int, *, causal: bool) -> Value:
        """Attention over the texts themselves, added to x and normed."""
        config = self._config
        q, k, v = (self.linear(x, f"{name}.self_attn.{part}_proj") for part in "qkv")
        attended = self.b.attention(
            q,
            k,
            v,
            layer_index=layer_index,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            causal=causal,
        )
        projected = self.linear(attended, f"{name}.self_attn.out_proj")
        return self.add_and_norm(x, projected, f"{name}.self_attn_layer_norm")

    def transform(self, x: Value, name: str, width: int) -> Value:
        """The MLP, added to x and normed."""
        hidden = self.b.activation(self.linear(x, f"{name}.fc1", width), self._config.activation)
        return self.add_and_norm(x, self.linear(hidden, f"{name}.fc2"), f"{name}.final_layer_norm")
