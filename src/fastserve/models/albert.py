"""ALBERT (arXiv 1909.11942): a BERT with narrow embeddings whose layers share their weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Value
from fastserve.models.config import EncoderConfig
from fastserve.models.config_value import read_count, require
from fastserve.models.head import HeadLayout, HeadLayouts
from fastserve.models.post_norm import LayerModules, PostNormEncoder, find_prefix, read_post_norm
from fastserve.types import JsonObject

_MODULES = LayerModules(
    query="attention.query",
    key="attention.key",
    value="attention.value",
    attention_output="attention.dense",
    attention_norm="attention.LayerNorm",
    up="ffn",
    down="ffn_output",
    output_norm="full_layer_layer_norm",
)
_POOLER = HeadLayout(pool="first", dense="albert.pooler", activation="tanh")
_HEADS: HeadLayouts = {
    "sequence-classification": _POOLER,
    "multiple-choice": _POOLER,
    "token-classification": HeadLayout(pool=None),
    "question-answering": HeadLayout(pool=None, classifier="qa_outputs"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AlbertConfig(EncoderConfig):
    """Its `num_layers` are dealt over `num_groups` sets of weights, in order; each of them is
    `layers_per_group` of attention and MLP."""

    embedding_size: int
    num_groups: int
    layers_per_group: int


def read_albert(config: JsonObject) -> AlbertConfig:
    """Read the config of an ALBERT. Raises as `fastserve.models.family.read_config`."""
    require(config, "embedding_size")
    return AlbertConfig(
        **asdict(read_post_norm({"hidden_act": "gelu_new", **config})),
        embedding_size=read_count(config, "embedding_size"),
        num_groups=read_count(config, "num_hidden_groups", default=1),
        layers_per_group=read_count(config, "inner_group_num", default=1),
    )


def albert_heads(config: EncoderConfig) -> HeadLayouts:
    """Those of `AlbertForSequenceClassification` and its like."""
    return _HEADS


def encode_albert(b: GraphBuilder, config: EncoderConfig, tensor_names: Collection[str]) -> Value:
    """`AlbertModel` without its pooler: token vectors [tokens, hidden_size]."""
    assert isinstance(config, AlbertConfig)
    encoder = PostNormEncoder(
        b, config, prefix=find_prefix("albert", tensor_names), tensor_names=tensor_names, modules=_MODULES
    )
    x = encoder.embed(width=config.embedding_size)
    x = encoder.linear(x, "encoder.embedding_hidden_mapping_in", config.hidden_size)
    for index in range(config.num_layers):
        # In floats, as `transformers` does: where groups are no equal share, the rounding decides.
        group = int(index / (config.num_layers / config.num_groups))
        for inner in range(config.layers_per_group):
            name = f"encoder.albert_layer_groups.{group}.albert_layers.{inner}"
            x = encoder.layer(x, name, layer_index=index * config.layers_per_group + inner)
    return x
