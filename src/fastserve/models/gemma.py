"""Gemma (arXiv 2403.08295), Gemma 2 (2408.00118) and the text model of Gemma 3 (2503.19786): a Llama whose
embeddings are scaled and whose norms' weights are stored less 1; from the second on with norms on both sides
of attention and MLP, and windows in most layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.models.config_value import (
    read_count,
    read_flag,
    read_optional_count,
    read_optional_positive,
    refuse,
)
from fastserve.models.llama import (
    FULL,
    SLIDING,
    LlamaConfig,
    read_layer_types,
    read_llama_kind,
    with_windows,
)
from fastserve.models.rope import RopeTables, read_rope
from fastserve.types import JsonObject

_HEAD_DIM = 256
_QUERY_SCALAR = 256
_WINDOW = 4096
_WINDOW_PATTERN = 6  # Gemma 3: every sixth layer attends to all
_ACTIVATION = "gelu_pytorch_tanh"
_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0
# What a config of transformers may leave out of Gemma 3's, because it is the default there.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
}


def read_gemma(config: JsonObject) -> LlamaConfig:
    """Read the config of a first Gemma. Raises as `fastserve.models.family.read_config`.

    Its `hidden_act` says "gelu" in the official files, and the approximation by tanh is what is meant.
    """
    activation = config.get("hidden_activation") or config.get("hidden_act")
    activation = _ACTIVATION if activation in (None, "gelu") else activation
    return _read_gemma_kind({**config, "hidden_activation": activation})


def read_gemma2(config: JsonObject) -> LlamaConfig:
    """Read the config of a Gemma 2. Raises as `fastserve.models.family.read_config`."""
    model = replace(
        _read_gemma_kind(config),
        query_scale=read_count(config, "query_pre_attn_scalar", default=_QUERY_SCALAR) ** -0.5,
        has_output_norms=True,
        attention_soft_cap=_read_soft_cap(config, "attn_logit_softcapping", 50.0),
        logits_soft_cap=_read_soft_cap(config, "final_logit_softcapping", 30.0),
    )
    usual = [FULL if index % 2 else SLIDING for index in range(model.num_layers)]
    return with_windows(model, _read_windows(config, read_layer_types(config, usual)))


def read_gemma3(config: JsonObject) -> LlamaConfig:
    """Read the config of a Gemma 3 text model, or the text part of one for images too. Raises as
    `fastserve.models.family.read_config`."""
    if config.get("text_config") is not None:
        config = _text_config(config)
    refuse(config, "attn_logit_softcapping", None)
    # Rotary parameters are for each kind of layer: the common reader is not shown them.
    model = _read_gemma_kind({key: value for key, value in config.items() if not key.startswith("rope_")})
    pattern = read_count(config, "sliding_window_pattern", default=_WINDOW_PATTERN)
    usual = [SLIDING if (index + 1) % pattern else FULL for index in range(model.num_layers)]
    kinds = read_layer_types(config, usual)
    ropes = _read_ropes(config, model.head_dim)
    model = replace(
        model,
        query_scale=read_count(config, "query_pre_attn_scalar", default=_QUERY_SCALAR) ** -0.5,
        has_qk_norm=True,
        has_output_norms=True,
        logits_soft_cap=_read_soft_cap(config, "final_logit_softcapping", None),
        layers=tuple(
            replace(layer, rope=ropes[kind]) for layer, kind in zip(model.layers, kinds, strict=True)
        ),
    )
    return with_windows(model, _read_windows(config, kinds))


def _read_gemma_kind(config: JsonObject) -> LlamaConfig:
    refuse(config, "use_bidirectional_attention", False)
    model = read_llama_kind(
        {"head_dim": _HEAD_DIM, **config}, activation_key="hidden_activation", is_usually_tied=True
    )
    has_bias = read_flag(config, "attention_bias")
    return replace(
        model,
        activation="gelu_tanh" if config.get("hidden_activation") is None else model.activation,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        norm_offset=1.0,
        embedding_scale=model.hidden_size**0.5,
    )


def _text_config(config: JsonObject) -> JsonObject:
    """The part about the language model; what holds for the whole is beside it."""
    text = config["text_config"]
    if not isinstance(text, dict):
        raise CheckpointError(f"the model's config has text_config={text!r}; it must be an object")
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise UnsupportedError(
            f"the model's config has text_config of {text['model_type']!r}, which is not supported",
            hint="choose a model whose text_config is of gemma3_text",
        )
    whole = {key: config[key] for key in ("tie_word_embeddings",) if config.get(key) is not None}
    return _GEMMA3_DEFAULTS | whole | text | {"model_type": config["model_type"]}


def _read_soft_cap(config: JsonObject, key: str, default: float | None) -> float | None:
    """Null means that there is none; an absent key means the family's own."""
    return read_optional_positive(config, key) if key in config else default


def _read_windows(config: JsonObject, kinds: Sequence[str]) -> list[int | None]:
    if "sliding_window" not in config:
        window: int | None = _WINDOW
    else:
        window = read_optional_count(config, "sliding_window")
    return [window if kind == SLIDING else None for kind in kinds]


def _read_ropes(config: JsonObject, head_dim: int) -> dict[str, RopeTables]:
    """Of layers that attend to all and of those that have a window: a mapping for each (transformers 5), or
    rope_theta with rope_scaling, and rope_local_base_freq (before)."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and {FULL, SLIDING} & parameters.keys():
        full, sliding = (parameters.get(kind) or {} for kind in (FULL, SLIDING))
    elif parameters is not None:
        raise CheckpointError(f"the model's config needs rope_parameters for {FULL} and {SLIDING}")
    else:
        full = {"rope_theta": config.get("rope_theta", _GLOBAL_THETA), **(config.get("rope_scaling") or {})}
        sliding = {"rope_theta": config.get("rope_local_base_freq", _LOCAL_THETA)}
    return {
        FULL: read_rope(config, head_dim, parameters=full, default_theta=_GLOBAL_THETA),
        SLIDING: read_rope(config, head_dim, parameters=sliding, default_theta=_LOCAL_THETA),
    }
