"""Mixtures of experts made like Llama: Mixtral (arXiv 2401.04088), Qwen-MoE (2407.10671) and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fastserve.errors import CheckpointError
from fastserve.models.config_value import read_count, read_flag, read_optional_count, require
from fastserve.models.llama import (
    FULL,
    SLIDING,
    Experts,
    LlamaConfig,
    read_layer_types,
    read_llama_kind,
    with_windows,
)
from fastserve.types import JsonObject

_MIXTRAL_THETA = 1_000_000.0
_MAX_WINDOW_LAYERS = 28  # of transformers, where the config does not say


def read_mixtral(config: JsonObject) -> LlamaConfig:
    """Read the config of a Mixtral model. Raises as `fastserve.models.family.read_config`."""
    model = read_llama_kind(config, default_theta=_MIXTRAL_THETA)
    require(config, "num_local_experts", "num_experts_per_tok")
    experts = Experts(
        count=read_count(config, "num_local_experts"),
        num_chosen=_read_chosen(config, "num_local_experts"),
        width=model.intermediate_size,
        has_normalized_shares=True,
        module="block_sparse_moe",
        parts=("w1", "w3", "w2"),
    )
    model = _with_experts(model, experts, range(model.num_layers))
    return with_windows(model, [read_optional_count(config, "sliding_window")] * model.num_layers)


def read_qwen2_moe(config: JsonObject) -> LlamaConfig:
    """Read the config of a Qwen1.5- or Qwen2-MoE. Raises as `fastserve.models.family.read_config`."""
    model = _read_qwen_moe(config, has_shared=True)
    model = replace(model, has_qkv_bias=read_flag(config, "qkv_bias", default=True))
    if not read_flag(config, "use_sliding_window"):
        return model
    num_sliding = config.get("max_window_layers", _MAX_WINDOW_LAYERS)
    usual = [
        SLIDING if (index + 1) % 2 and index < num_sliding else FULL for index in range(model.num_layers)
    ]
    window = read_count(config, "sliding_window", default=4096)
    kinds = read_layer_types(config, usual)
    return with_windows(model, [window if kind == SLIDING else None for kind in kinds])


def read_qwen3_moe(config: JsonObject) -> LlamaConfig:
    """Read the config of a Qwen3-MoE. Raises as `fastserve.models.family.read_config`."""
    model = _read_qwen_moe(config, has_shared=False)
    has_bias = read_flag(config, "attention_bias")
    model = replace(model, has_qkv_bias=has_bias, has_output_bias=has_bias, has_qk_norm=True)
    if not read_flag(config, "use_sliding_window"):
        return model
    return with_windows(model, [read_count(config, "sliding_window", default=4096)] * model.num_layers)


def _read_qwen_moe(config: JsonObject, *, has_shared: bool) -> LlamaConfig:
    """Every decoder_sparse_step-th layer has experts, but for those named in mlp_only_layers."""
    model = read_llama_kind(config)
    shared = ("shared_expert_intermediate_size",) if has_shared else ()
    # Transformers 5 writes the second name for what had the first.
    count_key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    require(config, count_key, "num_experts_per_tok", "moe_intermediate_size", *shared)
    experts = Experts(
        count=read_count(config, count_key),
        num_chosen=_read_chosen(config, count_key),
        width=read_count(config, "moe_intermediate_size"),
        has_normalized_shares=read_flag(config, "norm_topk_prob"),
        shared_width=read_count(config, shared[0]) if shared else None,
    )
    step = read_count(config, "decoder_sparse_step", default=1)
    plain = config.get("mlp_only_layers") or []
    if not isinstance(plain, list):
        raise CheckpointError(f"the model's config has mlp_only_layers={plain!r}; it must be a list")
    sparse = [index for index in range(model.num_layers) if index not in plain and (index + 1) % step == 0]
    return _with_experts(model, experts, sparse)


def _with_experts(model: LlamaConfig, experts: Experts, indices: Collection[int]) -> LlamaConfig:
    layers = (
        replace(layer, experts=experts) if index in indices else layer
        for index, layer in enumerate(model.layers)
    )
    return replace(model, layers=tuple(layers))


def _read_chosen(config: JsonObject, count_key: str) -> int:
    chosen, count = read_count(config, "num_experts_per_tok"), read_count(config, count_key)
    if chosen > count:
        raise CheckpointError(
            f"the model's config has num_experts_per_tok={chosen}, more than {count_key}={count}"
        )
    return chosen
