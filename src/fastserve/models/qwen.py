"""Qwen2 (arXiv 2407.10671) and 2.5, a Llama with biases in q/k/v; Qwen3 (arXiv 2505.09388), which norms every
head of queries and keys instead.
"""

from __future__ import annotations

from dataclasses import replace

from fastserve.models.config_value import read_count, read_flag
from fastserve.models.llama import (
    FULL,
    SLIDING,
    LlamaConfig,
    read_layer_types,
    read_llama_kind,
    with_windows,
)
from fastserve.types import JsonObject

_MAX_WINDOW_LAYERS = 28  # of transformers, where the config does not say


def read_qwen2(config: JsonObject) -> LlamaConfig:
    """Read the config of a Qwen2 or Qwen2.5 model. Raises as `fastserve.models.family.read_config`."""
    return _read_windows(config, replace(read_llama_kind(config), has_qkv_bias=True))


def read_qwen3(config: JsonObject) -> LlamaConfig:
    """Read the config of a Qwen3 model. Raises as `fastserve.models.family.read_config`."""
    model = read_llama_kind({"head_dim": 128, **config})
    has_bias = read_flag(config, "attention_bias")
    model = replace(model, has_qkv_bias=has_bias, has_output_bias=has_bias, has_qk_norm=True)
    return _read_windows(config, model)


def _read_windows(config: JsonObject, model: LlamaConfig) -> LlamaConfig:
    """Without use_sliding_window, sliding_window means nothing; with it, the first layers attend to all."""
    if not read_flag(config, "use_sliding_window"):
        return model
    window = read_count(config, "sliding_window", default=4096)
    num_full = config.get("max_window_layers", _MAX_WINDOW_LAYERS)
    usual = [FULL if index < num_full else SLIDING for index in range(model.num_layers)]
    kinds = read_layer_types(config, usual)
    return with_windows(model, [window if kind == SLIDING else None for kind in kinds])
