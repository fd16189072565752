"""DistilBERT (arXiv 1910.01108): a BERT of half the layers, without token types."""

from __future__ import annotations

from collections.abc import Collection

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Value
from fastserve.models.config import EncoderConfig
from fastserve.models.config_value import read_activation, read_count, require
from fastserve.models.head import HeadLayout, HeadLayouts
from fastserve.models.post_norm import (
    LayerModules,
    PostNormEncoder,
    find_prefix,
    read_own_head_dim,
)
from fastserve.types import JsonObject

_NORM_EPS = 1e-12  # in the code of `transformers`, not in its configs
_MODULES = LayerModules(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    output_norm="output_layer_norm",
)
_POOLED = HeadLayout(pool="first", dense="pre_classifier", activation="relu")
_HEADS: HeadLayouts = {
    "sequence-classification": _POOLED,
    "multiple-choice": _POOLED,
    "token-classification": HeadLayout(pool=None),
    "question-answering": HeadLayout(pool=None, classifier="qa_outputs"),
}


def read_distilbert(config: JsonObject) -> EncoderConfig:
    """Read the config of a DistilBERT. Raises as `fastserve.models.family.read_config`."""
    require(config, "vocab_size", "dim", "hidden_dim", "n_layers", "n_heads", "max_position_embeddings")
    width, num_heads = read_count(config, "dim"), read_count(config, "n_heads")
    head_dim = read_own_head_dim(config, "n_heads", num_heads, "dim", width)
    return EncoderConfig(
        model_type=str(config["model_type"]),
        vocab_size=read_count(config, "vocab_size"),
        hidden_size=width,
        intermediate_size=read_count(config, "hidden_dim"),
        num_layers=read_count(config, "n_layers"),
        num_heads=num_heads,
        activation=read_activation(config, key="activation", default="gelu"),
        norm_eps=_NORM_EPS,
        max_context=read_count(config, "max_position_embeddings"),
        num_token_types=0,
        own_head_dim=head_dim,
    )


def distilbert_heads(config: EncoderConfig) -> HeadLayouts:
    """Those of `DistilBertForSequenceClassification` and its like."""
    return _HEADS


def encode_distilbert(b: GraphBuilder, config: EncoderConfig, tensor_names: Collection[str]) -> Value:
    """`DistilBertModel`: token vectors [tokens, hidden_size]."""
    encoder = PostNormEncoder(
        b,
        config,
        prefix=find_prefix("distilbert", tensor_names),
        tensor_names=tensor_names,
        modules=_MODULES,
    )
    return encoder.layers(encoder.embed(), "transformer.layer")
