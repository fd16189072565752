"""Mistral (arXiv 2310.06825): a Llama whose layers attend within a window."""

from __future__ import annotations

from fastserve.models.config_value import read_optional_count, refuse
from fastserve.models.llama import LlamaConfig, read_llama_kind, with_windows
from fastserve.types import JsonObject


def read_mistral(config: JsonObject) -> LlamaConfig:
    """Read the config of a Mistral model. Raises as `fastserve.models.family.read_config`."""
    refuse(config, "layer_types", None)
    model = read_llama_kind(config)
    return with_windows(model, [read_optional_count(config, "sliding_window")] * model.num_layers)
