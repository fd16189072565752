"""A Hugging Face model in GGUF terms: metadata, tensor names and row order. The inverse of `gguf_model`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.gguf_config import ROPE_FREQS, llama3_factors
from fastserve.checkpoint.gguf_model import MODULES
from fastserve.checkpoint.gguf_writer import WrittenValue
from fastserve.checkpoint.sentence import GGUF_POOLING, POOLING_FLAGS
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import UnsupportedError
from fastserve.types import JsonObject

_WRITTEN = ("llama", "qwen2", "qwen3", "bert")
# Keys that say how the source file was written, and not what the model is.
_OF_THE_FILE = ("general.alignment", "general.file_type", "general.quantization_version")
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h


def export_metadata(checkpoint: Checkpoint) -> dict[str, WrittenValue]:
    """The metadata of a model, its tokenizer included; those of a GGUF file are copied.

    Raises:
        UnsupportedError: the architecture, a variation of it, or the tokenizer cannot be said in GGUF.
    """
    version: dict[str, WrittenValue] = {"general.quantization_version": _QUANTIZATION_VERSION}
    if checkpoint.metadata is not None:
        return {k: v for k, v in checkpoint.metadata.items() if k not in _OF_THE_FILE} | version
    from fastserve.checkpoint.gguf_tokenizer_export import export_tokenizer

    architecture = architecture_of(checkpoint)
    metadata = _bert(checkpoint) if architecture == "bert" else _llama(checkpoint)
    general: dict[str, WrittenValue] = {
        "general.architecture": architecture,
        "general.name": checkpoint.path.name,
    }
    own = {f"{architecture}.{key}": value for key, value in metadata.items() if value is not None}
    return {**general, **version, **own, **export_tokenizer(checkpoint)}


def architecture_of(checkpoint: Checkpoint) -> str:
    """Its name in GGUF.

    Raises:
        UnsupportedError: it is none that is written.
    """
    model_type = checkpoint.config.get("model_type")
    if model_type not in _WRITTEN:
        raise UnsupportedError(
            f"{checkpoint.path} has architecture {model_type!r}, written as GGUF are {', '.join(_WRITTEN)}",
            hint="use --to safetensors or --to compressed-tensors",
        )
    return str(model_type)


def gguf_name(architecture: str, name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor; None where the architecture has none in GGUF.

    >>> gguf_name("llama", "model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    module, _, kind = name.removeprefix(f"{architecture}.").rpartition(".")
    layer = next((part for part in module.split(".") if part.isdigit()), None)
    general = module if layer is None else module.replace(f".{layer}.", ".{}.", 1)
    found = next((key for key, value in MODULES[architecture].items() if value == general), None)
    return None if found is None else f"{found.format(layer)}.{kind}"


def turned_heads(architecture: str, name: str, config: JsonObject) -> int | None:
    """Heads of a tensor whose rows GGUF has in another order: its rotary embedding turns neighbours."""
    if architecture != "llama":
        return None
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    count: int | None = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
    return count


def in_pairs(rows: NDArray[np.uint8], heads: int) -> NDArray[np.uint8]:
    """Rows [rows, bytes] (head, element of the pair, pair) as rows (head, pair, element of the pair).

    Source: LlamaModel.permute of llama.cpp, convert_hf_to_gguf.py.
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def extra_tensors(checkpoint: Checkpoint) -> list[StoredTensor]:
    """What GGUF has as a tensor and Hugging Face in its config."""
    rope = _rope(checkpoint.config)
    if checkpoint.config.get("model_type") != "llama" or rope.get("rope_type") != "llama3":
        return []
    factors = llama3_factors(rope, _head_dim(checkpoint.config)).astype(np.float32)
    return [StoredTensor(ROPE_FREQS, TensorFormat.F32, factors.shape, factors.view(np.uint8))]


def _llama(checkpoint: Checkpoint) -> dict[str, WrittenValue | None]:
    """Of the Llama kind: of Qwen2 and 3 too."""
    config = checkpoint.config
    rope = _rope(config)
    kind = rope["rope_type"]
    if kind not in ("default", "llama3", "linear", "yarn"):
        raise _cannot_say(checkpoint, f"rope scaling {kind!r}")
    if config.get("use_sliding_window"):
        raise _cannot_say(checkpoint, "sliding-window attention in some of its layers")
    heads, head_dim = config["num_attention_heads"], _head_dim(config)
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.type": kind if kind in ("linear", "yarn") else None,
        "rope.scaling.factor": float(rope["factor"]) if kind in ("linear", "yarn") else None,
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings")
        if kind == "yarn"
        else None,
    }


def _bert(checkpoint: Checkpoint) -> dict[str, WrittenValue | None]:
    config = checkpoint.config
    if _head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise UnsupportedError(
            f"{checkpoint.path} has {config['num_attention_heads']} heads of {_head_dim(config)}, which are"
            f" not {config['hidden_size']} together: GGUF has no key for that in a BERT",
            hint="convert the model that heads were pruned from",
        )
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_epsilon": float(config["layer_norm_eps"]),
        "attention.causal": False,
        "pooling_type": _pooling_type(checkpoint),
    }


def _pooling_type(checkpoint: Checkpoint) -> int | None:
    sentence = checkpoint.sentence
    if sentence is None:
        return None
    if not any(str(module["type"]).endswith(".Normalize") for module in sentence.modules):
        raise _cannot_say(checkpoint, "embeddings of any length")
    modes = {kind: code for code, kind in GGUF_POOLING.items()}
    set_ = [kind for kind, flag in POOLING_FLAGS.items() if sentence.pooling.get(flag)]
    mode = sentence.pooling.get("pooling_mode", set_[0] if len(set_) == 1 else None)
    if mode not in modes:
        raise _cannot_say(checkpoint, f"a way of pooling, {sentence.pooling!s:.120},")
    return modes[mode]


def _cannot_say(checkpoint: Checkpoint, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{checkpoint.path} has {what}, which cannot be said in GGUF",
        hint="use --to safetensors or --to compressed-tensors",
    )


def _rope(config: JsonObject) -> JsonObject:
    """`rope_parameters` of transformers 5, or what earlier versions had in its place."""
    stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = stored.get("rope_type", stored.get("type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0), **stored, "rope_type": kind}


def _head_dim(config: JsonObject) -> int:
    stored: int | None = config.get("head_dim")
    return stored or config["hidden_size"] // config["num_attention_heads"]
