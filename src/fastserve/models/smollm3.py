"""SmolLM3: a Llama of which every fourth layer is not told positions (arXiv 2501.18795)."""

from __future__ import annotations

from dataclasses import replace

from fastserve.errors import CheckpointError
from fastserve.models.config_value import read_count, read_flag, read_optional_count
from fastserve.models.llama import (
    FULL,
    SLIDING,
    LlamaConfig,
    read_layer_types,
    read_llama_kind,
    with_windows,
)
from fastserve.types import JsonObject

_DEFAULT_THETA = 2_000_000.0


def read_smollm3(config: JsonObject) -> LlamaConfig:
    """Read the config of a SmolLM3 model. Raises as `fastserve.models.family.read_config`."""
    model = read_llama_kind(config, default_theta=_DEFAULT_THETA, is_usually_tied=True)
    turns = _read_turning_layers(config, model.num_layers)
    has_bias = read_flag(config, "attention_bias")
    model = replace(
        model,
        layers=tuple(
            layer if is_turning else replace(layer, rope=None)
            for layer, is_turning in zip(model.layers, turns, strict=True)
        ),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        has_mlp_bias=read_flag(config, "mlp_bias"),
    )
    if not read_flag(config, "use_sliding_window"):
        return model
    window = read_optional_count(config, "sliding_window")
    kinds = read_layer_types(config, [FULL if is_turning else SLIDING for is_turning in turns])
    return with_windows(model, [window if kind == SLIDING else None for kind in kinds])


def _read_turning_layers(config: JsonObject, num_layers: int) -> list[bool]:
    """Of `no_rope_layers`, which has a 1 for every layer with rotary positions; without it, every
    no_rope_layer_interval-th has none."""
    stored = config.get("no_rope_layers")
    if stored is None:
        interval = read_count(config, "no_rope_layer_interval", default=4)
        return [bool((index + 1) % interval) for index in range(num_layers)]
    if not isinstance(stored, list) or len(stored) != num_layers:
        raise CheckpointError(f"the model's config needs no_rope_layers for each of its {num_layers} layers")
    return [bool(entry) for entry in stored]
