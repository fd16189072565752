"""Phi-3 and 3.5 (arXiv 2404.14219), Phi-4-mini: a Llama with fused projections, windows and LongRoPE."""

from __future__ import annotations

from dataclasses import replace

from fastserve.models.config_value import read_count, read_optional_count
from fastserve.models.llama import LlamaConfig, read_llama_kind, with_windows
from fastserve.models.rope import rope_parameters
from fastserve.types import JsonObject

_ORIGINAL_CONTEXT = 4096  # of transformers, where the config does not say
_LONGROPE_NAMES = ("su", "yarn")  # that the first configs had for it


def read_phi3(config: JsonObject) -> LlamaConfig:
    """Read the config of a Phi-3 model. Raises as `fastserve.models.family.read_config`."""
    parameters = rope_parameters(config)
    kind = parameters.pop("type", None)
    kind = parameters.get("rope_type", kind)
    if kind is not None:
        parameters["rope_type"] = "longrope" if kind in _LONGROPE_NAMES else kind
    if parameters.get("rope_type") == "longrope":
        key = "original_max_position_embeddings"
        parameters[key] = read_count(config, key, default=_ORIGINAL_CONTEXT)
    model = read_llama_kind({**config, "rope_parameters": parameters}, partial_rotary=1.0)
    model = replace(model, is_fused=True)
    return with_windows(model, [read_optional_count(config, "sliding_window")] * model.num_layers)
