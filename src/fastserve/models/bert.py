"""BERT (arXiv 1810.04805): post-norm encoder with learned positions."""

from __future__ import annotations

from collections.abc import Collection

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Value
from fastserve.models.config import EncoderConfig
from fastserve.models.head import HeadLayout, HeadLayouts

_POOLER = HeadLayout(pool="first", dense="bert.pooler.dense", activation="tanh")
_HEADS: HeadLayouts = {
    "sequence-classification": _POOLER,
    "multiple-choice": _POOLER,
    "token-classification": HeadLayout(pool=None),
    "question-answering": HeadLayout(pool=None, classifier="qa_outputs"),
}


def bert_heads(config: EncoderConfig) -> HeadLayouts:
    """Those of `BertForSequenceClassification` and its like."""
    return _HEADS


def encode_bert(b: GraphBuilder, config: EncoderConfig, tensor_names: Collection[str]) -> Value:
    """`BertModel` without its pooler: token vectors [tokens, hidden_size].

    `tensor_names` are those of the checkpoint. They decide whether parameters are named `bert.*` (saved with
    a head on top) or not, and `LayerNorm.gamma` (converted from TensorFlow) or `LayerNorm.weight`.
    """
    prefix = "bert." if any(name.startswith("bert.") for name in tensor_names) else ""
    scale, shift = ("weight", "bias")
    if f"{prefix}embeddings.LayerNorm.gamma" in tensor_names:
        scale, shift = ("gamma", "beta")

    def linear(x: Value, name: str, width: int) -> Value:
        return b.linear(x, f"{prefix}{name}.weight", bias=f"{prefix}{name}.bias", width=width)

    def norm(x: Value, name: str) -> Value:
        return b.layer_norm(x, f"{prefix}{name}.{scale}", f"{prefix}{name}.{shift}", eps=config.norm_eps)

    def attention(x: Value, name: str, layer_index: int) -> Value:
        q, k, v = (linear(x, f"{name}.{part}", config.hidden_size) for part in ("query", "key", "value"))
        return b.attention(
            q,
            k,
            v,
            layer_index=layer_index,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            causal=False,
        )

    x = norm(_embeddings(b, config, f"{prefix}embeddings"), "embeddings.LayerNorm")
    for layer_index in range(config.num_layers):
        name = f"encoder.layer.{layer_index}"
        attended = attention(x, f"{name}.attention.self", layer_index)
        projected = linear(attended, f"{name}.attention.output.dense", config.hidden_size)
        x = norm(b.add(projected, x), f"{name}.attention.output.LayerNorm")
        hidden = linear(x, f"{name}.intermediate.dense", config.intermediate_size)
        hidden = b.activation(hidden, config.activation)
        projected = linear(hidden, f"{name}.output.dense", config.hidden_size)
        x = norm(b.add(projected, x), f"{name}.output.LayerNorm")
    return x


def _embeddings(b: GraphBuilder, config: EncoderConfig, name: str) -> Value:
    width = config.hidden_size
    words = b.embedding("token_ids", f"{name}.word_embeddings.weight", size=config.vocab_size, width=width)
    types = b.embedding(
        "token_types", f"{name}.token_type_embeddings.weight", size=config.num_token_types, width=width
    )
    positions = b.embedding(
        "positions", f"{name}.position_embeddings.weight", size=config.max_context, width=width
    )
    return b.add(b.add(words, types), positions)
