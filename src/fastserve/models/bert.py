"""BERT (arXiv 1810.04805): post-norm encoder with learned positions."""

from __future__ import annotations

from collections.abc import Collection

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Value
from fastserve.models.config import EncoderConfig
from fastserve.models.head import HeadLayout, HeadLayouts
from fastserve.models.post_norm import PostNormEncoder, find_prefix, read_post_norm
from fastserve.types import JsonObject

_POOLER = HeadLayout(pool="first", dense="bert.pooler.dense", activation="tanh")
_HEADS: HeadLayouts = {
    "sequence-classification": _POOLER,
    "multiple-choice": _POOLER,
    "token-classification": HeadLayout(pool=None),
    "question-answering": HeadLayout(pool=None, classifier="qa_outputs"),
}


def read_bert(config: JsonObject) -> EncoderConfig:
    """Read the config of a BERT. Raises as `fastserve.models.family.read_config`."""
    return read_post_norm(config)


def bert_heads(config: EncoderConfig) -> HeadLayouts:
    """Those of `BertForSequenceClassification` and its like."""
    return _HEADS


def encode_bert(b: GraphBuilder, config: EncoderConfig, tensor_names: Collection[str]) -> Value:
    """`BertModel` without its pooler: token vectors [tokens, hidden_size].

    `tensor_names` are those of the checkpoint. They decide whether parameters are named `bert.*` (saved with
    a head on top) or not, and `LayerNorm.gamma` (converted from TensorFlow) or `LayerNorm.weight`.
    """
    encoder = PostNormEncoder(b, config, prefix=find_prefix("bert", tensor_names), tensor_names=tensor_names)
    return encoder.layers(encoder.embed(), "encoder.layer")
