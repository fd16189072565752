"""RoBERTa (arXiv 1907.11692) and XLM-R (1911.02116): a BERT whose positions begin behind that of padding."""

from __future__ import annotations

from collections.abc import Collection

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Value
from fastserve.models.config import EncoderConfig
from fastserve.models.config_value import read_index
from fastserve.models.head import HeadLayout, HeadLayouts
from fastserve.models.post_norm import PostNormEncoder, find_prefix, read_post_norm
from fastserve.types import JsonObject

_PAD_TOKEN = 1
_HEADS: HeadLayouts = {
    "sequence-classification": HeadLayout(
        pool="first", dense="classifier.dense", activation="tanh", classifier="classifier.out_proj"
    ),
    "multiple-choice": HeadLayout(pool="first", dense="roberta.pooler.dense", activation="tanh"),
    "token-classification": HeadLayout(pool=None),
    "question-answering": HeadLayout(pool=None, classifier="qa_outputs"),
}


def read_roberta(config: JsonObject) -> EncoderConfig:
    """Read the config of a RoBERTa or XLM-R. Raises as `fastserve.models.family.read_config`.

    The rows of the position table up to that of the padding token's id are for padding: nothing reads them.
    A text that spells out the padding token is computed as any other (`transformers` takes it for padding).
    """
    pad_token = read_index(config, "pad_token_id", default=_PAD_TOKEN)
    return read_post_norm(config, position_offset=pad_token + 1)


def roberta_heads(config: EncoderConfig) -> HeadLayouts:
    """Those of `RobertaForSequenceClassification` and its like."""
    return _HEADS


def encode_roberta(b: GraphBuilder, config: EncoderConfig, tensor_names: Collection[str]) -> Value:
    """`RobertaModel` without its pooler: token vectors [tokens, hidden_size]."""
    prefix = find_prefix("roberta", tensor_names)
    encoder = PostNormEncoder(b, config, prefix=prefix, tensor_names=tensor_names)
    return encoder.layers(encoder.embed(), "encoder.layer")
