"""MPNet (arXiv 2004.09297): a BERT whose attention knows distances too, by T5's relative position bias."""

from __future__ import annotations

from collections.abc import Collection

from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Parameter, RelativeBias, Value
from fastserve.models.config import EncoderConfig
from fastserve.models.config_value import refuse
from fastserve.models.head import HeadLayout, HeadLayouts
from fastserve.models.post_norm import LayerModules, PostNormEncoder, find_prefix, read_post_norm
from fastserve.types import JsonObject

# Of transformers' MPNetEncoder: whatever a config says, it computes these.
_POSITION_OFFSET = 2
_NUM_BUCKETS, _MAX_DISTANCE = 32, 128

_MODULES = LayerModules(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_output="attention.attn.o",
    attention_norm="attention.LayerNorm",
)
_HEADS: HeadLayouts = {
    "sequence-classification": HeadLayout(
        pool="first", dense="classifier.dense", activation="tanh", classifier="classifier.out_proj"
    ),
    "multiple-choice": HeadLayout(pool="first", dense="mpnet.pooler.dense", activation="tanh"),
    "token-classification": HeadLayout(pool=None),
    "question-answering": HeadLayout(pool=None, classifier="qa_outputs"),
}


def read_mpnet(config: JsonObject) -> EncoderConfig:
    """Read the config of an MPNet. Raises as `fastserve.models.family.read_config`."""
    refuse(config, "relative_attention_num_buckets", _NUM_BUCKETS)
    return read_post_norm(config, has_token_types=False, position_offset=_POSITION_OFFSET)


def mpnet_heads(config: EncoderConfig) -> HeadLayouts:
    """Those of `MPNetForSequenceClassification` and its like."""
    return _HEADS


def encode_mpnet(b: GraphBuilder, config: EncoderConfig, tensor_names: Collection[str]) -> Value:
    """`MPNetModel` without its pooler: token vectors [tokens, hidden_size]."""
    prefix = find_prefix("mpnet", tensor_names)
    weight = Parameter((f"{prefix}encoder.relative_attention_bias.weight",), (_NUM_BUCKETS, config.num_heads))
    encoder = PostNormEncoder(
        b,
        config,
        prefix=prefix,
        tensor_names=tensor_names,
        modules=_MODULES,
        bias=RelativeBias(weight, max_distance=_MAX_DISTANCE, bidirectional=True),
    )
    return encoder.layers(encoder.embed(), "encoder.layer")
