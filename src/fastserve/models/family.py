"""From a model's config to its graph: the table of architectures that we have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.graph.node import Graph
from fastserve.models.bert import build_bert
from fastserve.models.config import DecoderConfig, EncoderConfig
from fastserve.models.llama import build_llama
from fastserve.models.pooling import Pooling
from fastserve.types import JsonObject

ModelConfig = DecoderConfig | EncoderConfig

_CONFIGS: Mapping[str, Callable[[JsonObject], ModelConfig]] = {
    "llama": DecoderConfig.from_hf,
    "bert": EncoderConfig.from_hf,
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
    if model_type not in _CONFIGS:
        raise UnsupportedError(
            f"architecture {model_type!r} is not supported", hint=f"supported are {', '.join(_CONFIGS)}"
        )
    return _CONFIGS[model_type](config)


def build_graph(
    config: ModelConfig, tensor_names: Collection[str] = (), *, pooling: Pooling | None = None
) -> Graph:
    """The graph of a model, before any pass.

    A decoder's output is `logits` [output rows, vocab_size]; an encoder's is `embedding` [sequences,
    hidden_size], pooled as `pooling` says (by default a mean, not normalized). `tensor_names` are those of
    the checkpoint, where a family has several ways to name its parameters.
    """
    if isinstance(config, DecoderConfig):
        return build_llama(config)
    return build_bert(config, tensor_names, pooling or Pooling())
