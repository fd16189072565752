"""Llama (arXiv 2302.13971, 2407.21783): pre-norm decoder, rotary positions, grouped queries, gated MLP."""

from __future__ import annotations

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Value
from fastserve.models.config import DecoderConfig


def build_llama(config: DecoderConfig) -> Graph:
    """The graph of `LlamaForCausalLM`: its output is `logits` [output rows, vocab_size]."""
    b = GraphBuilder()
    embedding = "model.embed_tokens.weight"
    x = b.embedding("token_ids", embedding, size=config.vocab_size, width=config.hidden_size)
    for layer_index in range(config.num_layers):
        prefix = f"model.layers.{layer_index}"
        normed = b.rms_norm(x, f"{prefix}.input_layernorm.weight", eps=config.norm_eps)
        x = b.add(x, _attention(b, config, normed, layer_index, f"{prefix}.self_attn"))
        normed = b.rms_norm(x, f"{prefix}.post_attention_layernorm.weight", eps=config.norm_eps)
        x = b.add(x, _mlp(b, config, normed, f"{prefix}.mlp"))
    x = b.rms_norm(x, "model.norm.weight", eps=config.norm_eps)
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    return b.finish(logits=b.gather_rows(b.linear(x, head, width=config.vocab_size)))


def _attention(b: GraphBuilder, config: DecoderConfig, x: Value, layer_index: int, prefix: str) -> Value:
    def project(x: Value, name: str, width: int) -> Value:
        bias = f"{prefix}.{name}.bias" if config.attention_bias else None
        return b.linear(x, f"{prefix}.{name}.weight", bias=bias, width=width)

    head_dim = config.head_dim
    q = project(x, "q_proj", config.num_heads * head_dim)
    k = project(x, "k_proj", config.num_kv_heads * head_dim)
    v = project(x, "v_proj", config.num_kv_heads * head_dim)
    attended = b.attention(
        b.rope(q, config.rope, head_dim=head_dim),
        b.rope(k, config.rope, head_dim=head_dim),
        v,
        layer_index=layer_index,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        causal=True,
    )
    return project(attended, "o_proj", config.hidden_size)


def _mlp(b: GraphBuilder, config: DecoderConfig, x: Value, prefix: str) -> Value:
    def project(x: Value, name: str, width: int) -> Value:
        bias = f"{prefix}.{name}.bias" if config.mlp_bias else None
        return b.linear(x, f"{prefix}.{name}.weight", bias=bias, width=width)

    gate = project(x, "gate_proj", config.intermediate_size)
    up = project(x, "up_proj", config.intermediate_size)
    return project(b.gated_activation(gate, up, config.activation), "down_proj", config.hidden_size)
