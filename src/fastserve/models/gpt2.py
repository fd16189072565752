"""GPT-2 (Radford et al. 2019): pre-norm decoder with learned positions, stored with matrices transposed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fastserve.checkpoint.tensor import StoredTensor
from fastserve.checkpoint.view import Arranged, transposed
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
from fastserve.types import JsonObject

# Stored as `Conv1D` of transformers has them, [in, out].
_QKV = "attn.c_attn.weight"
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt2Config(DecoderConfig):
    """A decoder of the GPT-2 kind."""

    intermediate_size: int
    scales_by_head_dim: bool
    scales_by_layer: bool  # scores of layer i are divided by i + 1

    def query_scale(self, layer_index: int) -> float:
        scale = self.head_dim**-0.5 if self.scales_by_head_dim else 1.0
        return scale / (layer_index + 1) if self.scales_by_layer else scale


def read_gpt2(config: JsonObject) -> Gpt2Config:
    """Read the config of a GPT-2 model. Raises as `fastserve.models.family.read_config`."""
    require(config, "vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
    refuse(config, "add_cross_attention", False)
    hidden_size, num_heads = read_count(config, "n_embd"), read_count(config, "n_head")
    check_divides("n_head", num_heads, "n_embd", hidden_size)
    return Gpt2Config(
        model_type="gpt2",
        vocab_size=read_count(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read_count(config, "n_inner", default=4 * hidden_size),
        num_layers=read_count(config, "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        activation=read_activation(config, default="gelu_new", key="activation_function"),
        norm_eps=read_eps({"layer_norm_epsilon": 1e-5, **config}, "layer_norm_epsilon"),
        max_context=read_count(config, "n_positions"),
        tie_word_embeddings=read_flag(config, "tie_word_embeddings", default=True),
        scales_by_head_dim=read_flag(config, "scale_attn_weights", default=True),
        scales_by_layer=read_flag(config, "scale_attn_by_inverse_layer_idx"),
    )


def arrange_gpt2(config: Gpt2Config, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensors with matrices as [out, in], which those that GPTQ or AWQ packed are already.

    Raises:
        UnsupportedError: a matrix is stored in blocks, which cannot be transposed.
    """
    width = config.hidden_size
    if any(name.endswith(_QKV) and tensors[name].shape == (3 * width, width) for name in tensors):
        return tensors
    return Arranged(tensors, {name: transposed for name in tensors if name.endswith(_TRANSPOSED)})


def build_gpt2(config: Gpt2Config, tensor_names: Collection[str] = ()) -> Graph:
    """The graph of `GPT2LMHeadModel`: its output is `logits` [output rows, vocab_size].

    `tensor_names` are those of the checkpoint: the first of them are saved without `transformer.`.
    """
    prefix = "" if "wte.weight" in tensor_names else "transformer."
    b = GraphBuilder()

    def linear(x: Value, name: str, width: int) -> Value:
        return b.linear(x, f"{name}.weight", bias=f"{name}.bias", width=width)

    def norm(x: Value, name: str) -> Value:
        return b.layer_norm(x, f"{name}.weight", f"{name}.bias", eps=config.norm_eps)

    def attention(x: Value, name: str, layer_index: int) -> Value:
        width = config.hidden_size
        qkv = linear(x, f"{name}.c_attn", 3 * width)
        q, k, v = (b.slice(qkv, part * width, width=width) for part in range(3))
        attended = b.attention(
            q,
            k,
            v,
            layer_index=layer_index,
            head_dim=config.head_dim,
            scale=config.query_scale(layer_index),
            causal=True,
        )
        return linear(attended, f"{name}.c_proj", width)

    def mlp(x: Value, name: str) -> Value:
        hidden = b.activation(linear(x, f"{name}.c_fc", config.intermediate_size), config.activation)
        return linear(hidden, f"{name}.c_proj", config.hidden_size)

    width, embedding = config.hidden_size, f"{prefix}wte.weight"
    x = b.add(
        b.embedding("token_ids", embedding, size=config.vocab_size, width=width),
        b.embedding("positions", f"{prefix}wpe.weight", size=config.max_context, width=width),
    )
    for layer_index in range(config.num_layers):
        name = f"{prefix}h.{layer_index}"
        x = b.add(x, attention(norm(x, f"{name}.ln_1"), f"{name}.attn", layer_index))
        x = b.add(x, mlp(norm(x, f"{name}.ln_2"), f"{name}.mlp"))
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    logits = b.linear(norm(x, f"{prefix}ln_f"), head, width=config.vocab_size)
    return b.finish(logits=b.gather_rows(logits))
