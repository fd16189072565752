"""OPT (arXiv 2205.01068): decoder with learned positions, normed before attention and MLP, or after them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Value
from fastserve.models.config import DecoderConfig
from fastserve.models.config_value import (
    check_divides,
    read_activation,
    read_count,
    read_flag,
    refuse,
    require,
)
from fastserve.types import JsonObject

_POSITION_OFFSET = 2  # the first rows of the table are left over from padding
_NORM_EPS = 1e-5  # of torch.nn.LayerNorm: configs have none
_PREFIXES = ("model.decoder.", "decoder.")  # the second in the first files


@dataclass(frozen=True, slots=True, kw_only=True)
class OptConfig(DecoderConfig):
    """A decoder of the OPT kind."""

    intermediate_size: int
    embedding_size: int  # projected to and from hidden_size where it is another
    has_bias: bool
    norms_first: bool
    has_final_norm: bool


def read_opt(config: JsonObject) -> OptConfig:
    """Read the config of an OPT model. Raises as `fastserve.models.family.read_config`."""
    require(
        config,
        "vocab_size",
        "hidden_size",
        "ffn_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    refuse(config, "layer_norm_elementwise_affine", True)
    hidden_size, num_heads = read_count(config, "hidden_size"), read_count(config, "num_attention_heads")
    check_divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    norms_first = read_flag(config, "do_layer_norm_before", default=True)
    return OptConfig(
        model_type="opt",
        vocab_size=read_count(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read_count(config, "ffn_dim"),
        embedding_size=read_count(config, "word_embed_proj_dim", default=hidden_size),
        num_layers=read_count(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        activation=read_activation(config, default="relu", key="activation_function"),
        norm_eps=_NORM_EPS,
        max_context=read_count(config, "max_position_embeddings"),
        tie_word_embeddings=read_flag(config, "tie_word_embeddings", default=True),
        has_bias=read_flag(config, "enable_bias", default=True),
        norms_first=norms_first,
        has_final_norm=norms_first and not read_flag(config, "_remove_final_layer_norm"),
    )


def build_opt(config: OptConfig, tensor_names: Collection[str] = ()) -> Graph:
    """The graph of `OPTForCausalLM`: its output is `logits` [output rows, vocab_size]."""
    has_embedding = (p for p in _PREFIXES if f"{p}embed_tokens.weight" in tensor_names)
    prefix = next(has_embedding, _PREFIXES[0])
    b = GraphBuilder()
    width = config.hidden_size

    def linear(x: Value, name: str, width: int) -> Value:
        return b.linear(x, f"{name}.weight", bias=f"{name}.bias" if config.has_bias else None, width=width)

    def norm(x: Value, name: str) -> Value:
        return b.layer_norm(x, f"{name}.weight", f"{name}.bias", eps=config.norm_eps)

    def attention(x: Value, name: str, layer_index: int) -> Value:
        q, k, v = (linear(x, f"{name}.{part}_proj", width) for part in "qkv")
        attended = b.attention(
            q,
            k,
            v,
            layer_index=layer_index,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            causal=True,
        )
        return linear(attended, f"{name}.out_proj", width)

    def layer(x: Value, name: str, layer_index: int) -> Value:
        attention_norm, mlp_norm = f"{name}.self_attn_layer_norm", f"{name}.final_layer_norm"
        attended = attention(
            norm(x, attention_norm) if config.norms_first else x, f"{name}.self_attn", layer_index
        )
        x = b.add(x, attended)
        x = x if config.norms_first else norm(x, attention_norm)
        hidden = linear(
            norm(x, mlp_norm) if config.norms_first else x, f"{name}.fc1", config.intermediate_size
        )
        x = b.add(x, linear(b.activation(hidden, config.activation), f"{name}.fc2", width))
        return x if config.norms_first else norm(x, mlp_norm)

    embedding = f"{prefix}embed_tokens.weight"
    is_projected = config.embedding_size != width
    x = b.embedding("token_ids", embedding, size=config.vocab_size, width=config.embedding_size)
    if is_projected:
        x = b.linear(x, f"{prefix}project_in.weight", width=width)
    positions = b.embedding(
        "positions",
        f"{prefix}embed_positions.weight",
        size=config.max_context + _POSITION_OFFSET,
        width=width,
        offset=_POSITION_OFFSET,
    )
    x = b.add(x, positions)
    for layer_index in range(config.num_layers):
        x = layer(x, f"{prefix}layers.{layer_index}", layer_index)
    if config.has_final_norm:
        x = norm(x, f"{prefix}final_layer_norm")
    if is_projected:
        x = b.linear(x, f"{prefix}project_out.weight", width=config.embedding_size)
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    return b.finish(logits=b.gather_rows(b.linear(x, head, width=config.vocab_size)))
