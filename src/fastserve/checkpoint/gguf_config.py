"""The config.json of the model in a GGUF file, from its metadata.

Keys and their meaning are those of llama.cpp (gguf-py/gguf/constants.py, convert_hf_to_gguf.py). What it has
in its code and not in the file is in ours too: the comments say where from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.gguf import GgufFile
from fastserve.checkpoint.gguf_encoder_config import read_bert, read_modernbert, read_t5
from fastserve.checkpoint.gguf_sizes import read_count, read_positive, read_sizes
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject

# Not parameters: how files store the rope scaling of Llama 3.1 and of Phi-3.
ROPE_FREQS = "rope_freqs.weight"
LONGROPE_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
ROPE_TENSORS = (ROPE_FREQS, *LONGROPE_FACTORS.values())

# What every Llama 3.1+ release uses, and what the files leave out (its config.json, "rope_scaling").
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Of the largest of each Gemma, whose scores are scaled by its own number: its layers (llama-model.cpp).
_LARGEST_GEMMA_LAYERS = {"gemma2": 46, "gemma3": 62}
_GEMMA3_LOCAL_THETA = 10_000.0  # llama-model.cpp, rope_freq_base_train_swa
_SMOLLM3_INTERVAL = 4  # llama-model.cpp, n_no_rope_layer_step


def config_from_gguf(file: GgufFile) -> JsonObject:
    """The config.json that the model was converted from, as far as it decides what is computed.

    Raises:
        UnsupportedError: the architecture, or a variation of it, is not one of ours.
        CheckpointError: a value is missing or out of range.
    """
    read = _READERS.get(file.architecture)
    if read is None:
        raise UnsupportedError(
            f"{file.path} has architecture {file.architecture!r},"
            f" supported in GGUF are {', '.join(_READERS)}",
            hint="docs/guides/add-a-model.md says how to add one",
        )
    return read(file)


def _read_llama(file: GgufFile) -> JsonObject:
    """Llama, and what the format tells from it by its keys alone: Mistral has a window, Mixtral experts."""
    if file.metadata.integer("llama.expert_count"):
        return _read_mixtral(file)
    config = _llama_kind(file, "llama", "LlamaForCausalLM") | {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    window = _window(file)
    if window is None or window >= config["max_position_embeddings"]:
        return config
    for flag in ("attention_bias", "mlp_bias"):
        if config[flag]:
            raise UnsupportedError(f"{file.path}: a sliding window of {window} tokens beside {flag}")
    return config | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": window,
    }


def _read_mixtral(file: GgufFile) -> JsonObject:
    return _llama_kind(file, "mixtral", "MixtralForCausalLM") | {
        "num_local_experts": read_count(file.metadata, "llama.expert_count"),
        "num_experts_per_tok": read_count(file.metadata, "llama.expert_used_count"),
        "sliding_window": _window(file),
    }


def _read_qwen2moe(file: GgufFile) -> JsonObject:
    return _llama_kind(file, "qwen2_moe", "Qwen2MoeForCausalLM") | {
        **_qwen_experts(file, has_normalized_shares=False),
        "shared_expert_intermediate_size": read_count(
            file.metadata, "qwen2moe.expert_shared_feed_forward_length"
        ),
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def _read_qwen3moe(file: GgufFile) -> JsonObject:
    return _llama_kind(file, "qwen3_moe", "Qwen3MoeForCausalLM") | {
        **_qwen_experts(file, has_normalized_shares=True),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def _qwen_experts(file: GgufFile, *, has_normalized_shares: bool) -> dict[str, Any]:
    """Whether shares are normalized is in the code of llama.cpp (llama-model.cpp, build_moe_ffn's norm_w)."""
    prefix = f"{file.architecture}.expert"
    return {
        "num_experts": read_count(file.metadata, f"{prefix}_count"),
        "num_experts_per_tok": read_count(file.metadata, f"{prefix}_used_count"),
        "moe_intermediate_size": read_count(file.metadata, f"{prefix}_feed_forward_length"),
        "norm_topk_prob": has_normalized_shares,
    }


def _read_smollm3(file: GgufFile) -> JsonObject:
    return _llama_kind(file, "smollm3", "SmolLM3ForCausalLM") | {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "no_rope_layer_interval": _SMOLLM3_INTERVAL,
    }


def _read_qwen2(file: GgufFile) -> JsonObject:
    return _llama_kind(file, "qwen2", "Qwen2ForCausalLM")


def _read_qwen3(file: GgufFile) -> JsonObject:
    has_bias = "blk.0.attn_q.bias" in file.tensors
    return _llama_kind(file, "qwen3", "Qwen3ForCausalLM") | {"attention_bias": has_bias}


def _read_gemma(file: GgufFile) -> JsonObject:
    return _llama_kind(file, "gemma", "GemmaForCausalLM") | {"hidden_activation": "gelu_pytorch_tanh"}


def _read_gemma2(file: GgufFile) -> JsonObject:
    config = _llama_kind(file, "gemma2", "Gemma2ForCausalLM")
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(file, config),
        "sliding_window": _window(file),
        "attn_logit_softcapping": file.metadata.number("gemma2.attn_logit_softcapping"),
        "final_logit_softcapping": file.metadata.number("gemma2.final_logit_softcapping"),
    }


def _read_gemma3(file: GgufFile) -> JsonObject:
    config = _llama_kind(file, "gemma3_text", "Gemma3ForCausalLM")
    full = config.pop("rope_parameters")
    theta = file.metadata.number("gemma3.rope.freq_base_swa")
    sliding = {"rope_type": "default", "rope_theta": _GEMMA3_LOCAL_THETA if theta is None else theta}
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(file, config),
        "sliding_window": _window(file),
        "final_logit_softcapping": file.metadata.number("gemma3.final_logit_softcapping"),
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
    }


def _read_phi3(file: GgufFile) -> JsonObject:
    config = _llama_kind(file, "phi3", "Phi3ForCausalLM", is_partial=True)
    window = _window(file)
    return config | {
        # 0 says that there is none.
        "sliding_window": window or None,
        "original_max_position_embeddings": file.metadata.integer("phi3.rope.scaling.original_context_length")
        or config["max_position_embeddings"],
    }


def _read_gpt2(file: GgufFile) -> JsonObject:
    config = read_sizes(file)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config["vocab_size"],
        "n_embd": config["hidden_size"],
        "n_inner": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_positions": config["max_position_embeddings"],
        "layer_norm_epsilon": read_positive(file.metadata, "gpt2.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{key: value for key, value in config.items() if key.endswith("_token_id")},
    }


def _read_gptneox(file: GgufFile) -> JsonObject:
    config, metadata = read_sizes(file), file.metadata
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    is_parallel = metadata.flag("gptneox.use_parallel_residual")
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **config,
        "hidden_act": "gelu",
        "layer_norm_eps": read_positive(metadata, "gptneox.attention.layer_norm_epsilon"),
        "use_parallel_residual": True if is_parallel is None else is_parallel,
        "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
        "rope_parameters": _rope_parameters(file, head_dim, is_partial=True),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


# By general.architecture.
_READERS: Mapping[str, Callable[[GgufFile], JsonObject]] = {
    "llama": _read_llama,
    "bert": read_bert,
    "modern-bert": read_modernbert,
    "t5": read_t5,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
    "qwen2moe": _read_qwen2moe,
    "qwen3moe": _read_qwen3moe,
    "gemma": _read_gemma,
    "gemma2": _read_gemma2,
    "gemma3": _read_gemma3,
    "phi3": _read_phi3,
    "smollm3": _read_smollm3,
    "gpt2": _read_gpt2,
    "gptneox": _read_gptneox,
}


def _llama_kind(
    file: GgufFile, model_type: str, class_name: str, *, is_partial: bool = False
) -> dict[str, Any]:
    """What is stored alike of all that are made like Llama. With `is_partial`, part of a head may turn."""
    metadata, architecture = file.metadata, file.architecture
    config = read_sizes(file)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = metadata.integer(f"{architecture}.attention.key_length")
    if head_dim is None:
        if hidden % heads:
            raise CheckpointError(f"{file.path}: {heads} heads do not divide width {hidden}")
        head_dim = hidden // heads
    value_dim = metadata.integer(f"{architecture}.attention.value_length")
    if value_dim not in (None, head_dim):
        raise UnsupportedError(f"{file.path}: values of {value_dim} dimensions beside keys of {head_dim}")
    kv_heads = metadata.integer(f"{architecture}.attention.head_count_kv") or heads
    if not 0 < kv_heads <= heads or heads % kv_heads:
        raise CheckpointError(f"{file.path}: {kv_heads} key-value heads do not divide {heads} heads")
    rope = _rope_parameters(file, head_dim, is_partial=is_partial)
    return {
        "architectures": [class_name],
        "model_type": model_type,
        **config,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": read_positive(metadata, f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _window(file: GgufFile) -> int | None:
    return file.metadata.integer(f"{file.architecture}.attention.sliding_window")


def _query_scalar(file: GgufFile, config: JsonObject) -> int:
    """Of Gemma: scores are divided by its root. The file does not say; llama.cpp knows the largest model."""
    if config["num_hidden_layers"] == _LARGEST_GEMMA_LAYERS[file.architecture]:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def _rope_parameters(file: GgufFile, head_dim: int, *, is_partial: bool = False) -> dict[str, Any]:
    """`rope_parameters` of transformers 5: default, linear, yarn, longrope, or llama3 (recovered from its
    factors)."""
    metadata, architecture = file.metadata, file.architecture
    theta = metadata.number(f"{architecture}.rope.freq_base")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0 if theta is None else theta}
    if not parameters["rope_theta"] > 0:
        raise CheckpointError(
            f"{file.path}: {architecture}.rope.freq_base is {theta}, a positive number was expected"
        )
    rope_dim = metadata.integer(f"{architecture}.rope.dimension_count")
    if rope_dim not in (None, head_dim):
        if not is_partial:
            raise UnsupportedError(f"{file.path}: rotary embedding of {rope_dim} of {head_dim} dimensions")
        parameters["partial_rotary_factor"] = rope_dim / head_dim
    elif is_partial:
        parameters["partial_rotary_factor"] = 1.0
    if ROPE_FREQS in file.tensors:
        return parameters | _llama3_rope(file, parameters["rope_theta"], head_dim)
    if any(name in file.tensors for name in LONGROPE_FACTORS.values()):
        return parameters | _longrope(file)
    scaling = metadata.text(f"{architecture}.rope.scaling.type")
    match scaling:
        case None | "none":
            return parameters
        case "linear" | "yarn":
            factor = read_positive(metadata, f"{architecture}.rope.scaling.factor")
            parameters |= {"rope_type": scaling, "factor": factor}
            original = metadata.integer(f"{architecture}.rope.scaling.original_context_length")
            if scaling == "yarn" and original is not None:
                parameters["original_max_position_embeddings"] = original
            return parameters
        case other:
            raise UnsupportedError(
                f"{file.path} has rope scaling {other!r}, supported are linear, yarn, longrope and llama3"
            )


def _longrope(file: GgufFile) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": "longrope"}
    for key, name in LONGROPE_FACTORS.items():
        stored = file.tensors.get(name)
        if stored is None or stored.format.name != "F32":
            raise CheckpointError(f"{file.path}: {name} of its rope scaling is missing or not float32")
        parameters[key] = stored.data.view("<f4").astype(np.float64).tolist()
    scale = file.metadata.number(f"{file.architecture}.rope.scaling.attn_factor")
    if scale is not None:
        parameters["attention_factor"] = scale
    original = file.metadata.integer(f"{file.architecture}.rope.scaling.original_context_length")
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    return parameters


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters whose frequency divisors the file stores; UnsupportedError where they are unusual."""
    stored = file.tensors[ROPE_FREQS]
    factors = stored.data.view("<f4").astype(np.float64) if stored.format.name == "F32" else np.zeros(0)
    parameters = {"rope_type": "llama3", "factor": float(factors.max(initial=1.0)), **_LLAMA3_ROPE}
    expected = llama3_factors({**parameters, "rope_theta": theta}, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5):
        raise UnsupportedError(f"{file.path}: {ROPE_FREQS} holds no rope scaling of Llama 3.1")
    return parameters


def llama3_factors(parameters: JsonObject, head_dim: int) -> NDArray[np.float64]:
    """The divisors of frequencies [head_dim / 2] that `rope_parameters` of llama3 stand for.

    Formula: _compute_llama3_parameters of transformers' modeling_rope_utils.py.
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelengths = 2 * np.pi * parameters["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip(
        (parameters["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0.0, 1.0
    )
    factors: NDArray[np.float64] = 1 / ((1 - smooth) / parameters["factor"] + smooth)
    return factors
