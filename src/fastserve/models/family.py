"""From a model's config to its graph: the table of architectures that we have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph, Value
from fastserve.models.albert import albert_heads, encode_albert, read_albert
from fastserve.models.bert import bert_heads, encode_bert, read_bert
from fastserve.models.config import DecoderConfig, EncoderConfig
from fastserve.models.distilbert import distilbert_heads, encode_distilbert, read_distilbert
from fastserve.models.head import Ending, Head, HeadLayouts, finish_with_embedding, finish_with_head
from fastserve.models.llama import build_llama
from fastserve.models.modernbert import encode_modernbert, modernbert_heads, read_modernbert
from fastserve.models.mpnet import encode_mpnet, mpnet_heads, read_mpnet
from fastserve.models.pooling import Pooling
from fastserve.models.roberta import encode_roberta, read_roberta, roberta_heads
from fastserve.types import JsonObject

ModelConfig = DecoderConfig | EncoderConfig


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """A page of `models`: its reader of configs, its encoder, which gives token vectors [tokens, hidden_size]
    by the names of a checkpoint's tensors, and the heads that may follow."""

    read_config: Callable[[JsonObject], EncoderConfig]
    encode: Callable[[GraphBuilder, EncoderConfig, Collection[str]], Value]
    heads: Callable[[EncoderConfig], HeadLayouts]


_DECODERS: Mapping[str, Callable[[JsonObject], DecoderConfig]] = {"llama": DecoderConfig.from_hf}
_ROBERTA = EncoderFamily(read_roberta, encode_roberta, roberta_heads)
_ENCODERS: Mapping[str, EncoderFamily] = {
    "bert": EncoderFamily(read_bert, encode_bert, bert_heads),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "mpnet": EncoderFamily(read_mpnet, encode_mpnet, mpnet_heads),
    "distilbert": EncoderFamily(read_distilbert, encode_distilbert, distilbert_heads),
    "albert": EncoderFamily(read_albert, encode_albert, albert_heads),
    "modernbert": EncoderFamily(read_modernbert, encode_modernbert, modernbert_heads),
}


def read_config(config: JsonObject) -> ModelConfig:
    """Read a Hugging Face `config.json`, by its `model_type`.

    Raises:
        CheckpointError: the config lacks keys (all are named) or is inconsistent.
        UnsupportedError: an architecture, or a feature of one, that we do not have.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise CheckpointError("the model's config lacks model_type")
    if model_type in _DECODERS:
        return _DECODERS[model_type](config)
    if model_type in _ENCODERS:
        return _ENCODERS[model_type].read_config(config)
    raise UnsupportedError(
        f"architecture {model_type!r} is not supported",
        hint=f"supported are {', '.join((*_DECODERS, *_ENCODERS))}",
    )


def build_graph(
    config: ModelConfig, tensor_names: Collection[str] = (), *, ending: Ending | None = None
) -> Graph:
    """The graph of a model, before any pass.

    A decoder's output is `logits` [output rows, vocab_size]. An encoder's is what its `ending` says: by a
    `Pooling` (by default a mean, not normalized) `embedding` [sequences, hidden_size], by a `Head` `logits`,
    [sequences, num_labels] or [tokens, num_labels]. `tensor_names` are those of the checkpoint, where a
    family has several ways to name its parameters.

    Raises:
        UnsupportedError: the family has no such head.
    """
    if isinstance(config, DecoderConfig):
        return build_llama(config)
    family = _ENCODERS[config.model_type]
    b = GraphBuilder()
    x = family.encode(b, config, tensor_names)
    if not isinstance(ending, Head):
        return finish_with_embedding(b, x, ending or Pooling())
    layouts = family.heads(config)
    if ending.kind not in layouts:
        raise UnsupportedError(
            f"a {config.model_type} model for {ending.kind} is not supported",
            hint=f"supported are {', '.join(layouts)}",
        )
    return finish_with_head(b, x, ending, layouts[ending.kind])
