"""GPT-NeoX (arXiv 2204.06745) and Pythia (2304.01373): attention and MLP side by side, positions that turn
part of each head. Queries, keys and values are one matrix, stored head by head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from fastserve.checkpoint.tensor import StoredTensor
from fastserve.checkpoint.view import Arranged, rows_regrouped
from fastserve.errors import UnsupportedError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, RopeTable, Value
from fastserve.models.config import DecoderConfig
from fastserve.models.config_value import (
    check_divides,
    read_activation,
    read_count,
    read_eps,
    read_flag,
    require,
)
from fastserve.models.rope import read_rope, rope_parameters
from fastserve.types import JsonObject

_ROTARY_SHARE = 0.25  # of transformers, where the config does not say
_FUSED = ("attention.query_key_value.weight", "attention.query_key_value.bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class GptNeoxConfig(DecoderConfig):
    """A decoder of the GPT-NeoX kind."""

    intermediate_size: int
    rope: RopeTable
    has_attention_bias: bool
    is_parallel: bool  # attention and MLP read the same values


def read_gpt_neox(config: JsonObject) -> GptNeoxConfig:
    """Read the config of a GPT-NeoX model. Raises as `fastserve.models.family.read_config`."""
    require(
        config,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "layer_norm_eps",
        "max_position_embeddings",
    )
    hidden_size, num_heads = read_count(config, "hidden_size"), read_count(config, "num_attention_heads")
    check_divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    head_dim = hidden_size // num_heads
    named_otherwise = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    outer = {new: config[old] for old, new in named_otherwise.items() if config.get(old) is not None}
    parameters = outer | rope_parameters(config)
    rope = read_rope(config, head_dim, parameters=parameters, partial=_ROTARY_SHARE)
    if rope.long is not None:
        raise UnsupportedError(
            "rope type 'longrope' is not supported for gpt_neox", hint="it is for llama and its kind"
        )
    return GptNeoxConfig(
        model_type="gpt_neox",
        vocab_size=read_count(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read_count(config, "intermediate_size"),
        num_layers=read_count(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        activation=read_activation(config, default="gelu"),
        norm_eps=read_eps(config, "layer_norm_eps"),
        max_context=read_count(config, "max_position_embeddings"),
        tie_word_embeddings=read_flag(config, "tie_word_embeddings"),
        rope=rope.usual,
        has_attention_bias=read_flag(config, "attention_bias", default=True),
        is_parallel=read_flag(config, "use_parallel_residual", default=True),
    )


def arrange_gpt_neox(
    config: GptNeoxConfig, tensors: Mapping[str, StoredTensor]
) -> Mapping[str, StoredTensor]:
    """The tensors with all queries first, then all keys, then all values."""
    shape = (config.num_heads, 3, config.head_dim)
    regroup = partial(rows_regrouped, shape=shape, axes=(1, 0, 2))
    return Arranged(tensors, {name: regroup for name in tensors if name.endswith(_FUSED)})


def build_gpt_neox(config: GptNeoxConfig, tensor_names: Collection[str] = ()) -> Graph:
    """The graph of `GPTNeoXForCausalLM`: its output is `logits` [output rows, vocab_size].

    `tensor_names` are those of the checkpoint, whose head is `embed_out`, or `lm_head` in newer files.
    """
    b = GraphBuilder()
    width = config.hidden_size

    def linear(x: Value, name: str, width: int, *, has_bias: bool = True) -> Value:
        return b.linear(x, f"{name}.weight", bias=f"{name}.bias" if has_bias else None, width=width)

    def norm(x: Value, name: str) -> Value:
        return b.layer_norm(x, f"{name}.weight", f"{name}.bias", eps=config.norm_eps)

    def attention(x: Value, name: str, layer_index: int) -> Value:
        has_bias = config.has_attention_bias
        qkv = linear(x, f"{name}.query_key_value", 3 * width, has_bias=has_bias)
        q, k, v = (b.slice(qkv, part * width, width=width) for part in range(3))
        attended = b.attention(
            b.rope(q, config.rope, head_dim=config.head_dim),
            b.rope(k, config.rope, head_dim=config.head_dim),
            v,
            layer_index=layer_index,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            causal=True,
        )
        return linear(attended, f"{name}.dense", width, has_bias=has_bias)

    def mlp(x: Value, name: str) -> Value:
        hidden = linear(x, f"{name}.dense_h_to_4h", config.intermediate_size)
        return linear(b.activation(hidden, config.activation), f"{name}.dense_4h_to_h", width)

    embedding = "gpt_neox.embed_in.weight"
    x = b.embedding("token_ids", embedding, size=config.vocab_size, width=width)
    for layer_index in range(config.num_layers):
        name = f"gpt_neox.layers.{layer_index}"
        attended = attention(norm(x, f"{name}.input_layernorm"), f"{name}.attention", layer_index)
        if config.is_parallel:
            hidden = mlp(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
            x = b.add(x, b.add(hidden, attended))
        else:
            x = b.add(x, attended)
            x = b.add(x, mlp(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp"))
    head = "embed_out.weight" if "embed_out.weight" in tensor_names else "lm_head.weight"
    if config.tie_word_embeddings:
        head = embedding
    logits = b.linear(norm(x, "gpt_neox.final_layer_norm"), head, width=config.vocab_size)
    return b.finish(logits=b.gather_rows(logits))
