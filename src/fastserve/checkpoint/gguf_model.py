"""A GGUF file in Hugging Face terms: config.json, parameter names, row order and special token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.gguf import GgufFile, GgufMetadata
from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject

# GGUF module name → Hugging Face module name, {} being the layer index
# (gguf-py/gguf/tensor_mapping.py of ggml-org/llama.cpp).
_LLAMA_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_BERT_MODULES = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "blk.{}.attn_q": "encoder.layer.{}.attention.self.query",
    "blk.{}.attn_k": "encoder.layer.{}.attention.self.key",
    "blk.{}.attn_v": "encoder.layer.{}.attention.self.value",
    "blk.{}.attn_output": "encoder.layer.{}.attention.output.dense",
    "blk.{}.attn_output_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "blk.{}.ffn_up": "encoder.layer.{}.intermediate.dense",
    "blk.{}.ffn_down": "encoder.layer.{}.output.dense",
    "blk.{}.layer_output_norm": "encoder.layer.{}.output.LayerNorm",
}
_QWEN3_MODULES = {
    **_LLAMA_MODULES,
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
MODULES = {"llama": _LLAMA_MODULES, "qwen2": _LLAMA_MODULES, "qwen3": _QWEN3_MODULES, "bert": _BERT_MODULES}
_CAUSAL_MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

ROPE_FREQS = "rope_freqs.weight"  # not a parameter: how Llama 3.1 files store their rope scaling
_MAX_LAYERS = 10_000
# What every Llama 3.1+ release uses, and what the files leave out (its config.json, "rope_scaling").
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_from_gguf(file: GgufFile) -> JsonObject:
    """The config.json that the model was converted from, as far as it decides what is computed.

    Raises:
        UnsupportedError: the architecture, or a variation of it, is not one of ours.
        CheckpointError: a value is missing or out of range.
    """
    match file.architecture:
        case "llama" | "qwen2" | "qwen3":
            return _llama_config(file)
        case "bert":
            return _bert_config(file)
        case other:
            raise UnsupportedError(
                f"{file.path} has architecture {other!r}, supported in GGUF are {', '.join(MODULES)}"
            )


class HfTensors(Mapping[str, StoredTensor]):
    """The tensors of a GGUF file under their Hugging Face names.

    Conversion to GGUF reorders the rows of Llama's q and k for a rotary embedding of neighbouring pairs. They
    come back in the order of halves; all others are views of the mapped file.
    """

    def __init__(self, file: GgufFile, config: JsonObject) -> None:
        self._tensors = file.tensors
        self._gguf_names = {hf_name(file, name): name for name in file.tensors if name != ROPE_FREQS}
        self._heads: dict[str, int] = {}
        if file.architecture == "llama":
            self._heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
            for name in self._gguf_names:
                self._check_heads(file, name)

    def __getitem__(self, name: str) -> StoredTensor:
        tensor = replace(self._tensors[self._gguf_names[name]], name=name)
        heads = self._heads.get(name.split(".")[-2])
        return tensor if heads is None else _in_halves(tensor, heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._gguf_names)

    def __len__(self) -> int:
        return len(self._gguf_names)

    def _check_heads(self, file: GgufFile, name: str) -> None:
        heads = self._heads.get(name.split(".")[-2])
        rows = self._tensors[self._gguf_names[name]].shape[0]
        if heads is not None and rows % (2 * heads):
            raise CheckpointError(
                f"{file.path}: {name} has {rows} rows, a multiple of {2 * heads} was expected"
            )


def hf_name(file: GgufFile, name: str) -> str:
    """The Hugging Face name of a GGUF tensor.

    Raises:
        UnsupportedError: the architecture has no such tensor in the variations that we have.
    """
    match = re.fullmatch(r"(blk\.)?(\d+)?(.*)\.(weight|bias)", name)
    if match:
        prefix, layer, rest, kind = match.groups()
        gguf_module = f"{prefix or ''}{'' if layer is None else '{}'}{rest}"
        module = MODULES[file.architecture].get(gguf_module)
        if module is not None:
            return f"{module.format(layer)}.{kind}"
    raise UnsupportedError(
        f"{file.path}: tensor {name!r} is unknown for architecture {file.architecture!r}",
        hint="mixtures of experts and multimodal variations are not supported",
    )


def _in_halves(pairs: StoredTensor, heads: int) -> ComputedTensor:
    """Rows (head, pair, element of the pair) as rows (head, element of the pair, pair).

    Bytes are moved, for a row is a whole number of blocks.
    """
    num_rows = pairs.shape[0]
    order = np.arange(num_rows).reshape(heads, num_rows // heads // 2, 2).swapaxes(1, 2).reshape(num_rows)
    rows = pairs.data.reshape(num_rows, -1)
    return ComputedTensor(
        pairs.name, pairs.format, pairs.shape, lambda begin, end: rows[order[begin:end]].reshape(-1)
    )


def _llama_config(file: GgufFile) -> JsonObject:
    """Of the Llama kind: of Qwen2 and 3 too."""
    metadata, architecture = file.metadata, file.architecture
    config = _transformer_config(file)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = metadata.integer(f"{architecture}.attention.key_length") or hidden // heads
    _refuse_variations(metadata, architecture, head_dim)
    kv_heads = metadata.integer(f"{architecture}.attention.head_count_kv") or heads
    if not 0 < kv_heads <= heads or heads % kv_heads:
        raise CheckpointError(f"{file.path}: {kv_heads} key-value heads do not divide {heads} heads")
    rope = _rope_parameters(file, head_dim)
    biases = {"attention_bias": "blk.0.attn_q.bias" in file.tensors}
    if architecture == "llama":
        biases["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return {
        "architectures": [_CAUSAL_MODELS[architecture]],
        "model_type": architecture,
        **config,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _positive(metadata, f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        **({} if architecture == "qwen2" else biases),  # Qwen2's are there without being said
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _bert_config(file: GgufFile) -> JsonObject:
    token_types = file.tensors.get("token_types.weight")
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        **_transformer_config(file),
        "hidden_act": "gelu",
        "layer_norm_eps": _positive(file.metadata, "bert.attention.layer_norm_epsilon"),
        "type_vocab_size": 2 if token_types is None else token_types.shape[0],
    }


def _transformer_config(file: GgufFile) -> dict[str, Any]:
    """What every architecture has."""
    metadata, architecture = file.metadata, file.architecture
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{file.path} has no token_embd.weight matrix", hint="a vocabulary alone is no model"
        )
    config = {
        "vocab_size": embedding.shape[0],
        "hidden_size": _count(metadata, f"{architecture}.embedding_length"),
        "intermediate_size": _count(metadata, f"{architecture}.feed_forward_length"),
        "num_hidden_layers": _count(metadata, f"{architecture}.block_count"),
        "num_attention_heads": _count(metadata, f"{architecture}.attention.head_count"),
        "max_position_embeddings": _count(metadata, f"{architecture}.context_length"),
    }
    if config["hidden_size"] != embedding.shape[1]:
        raise CheckpointError(
            f"{file.path}: embedding_length is {config['hidden_size']},"
            f" token_embd.weight has {embedding.shape[1]} columns"
        )
    if config["hidden_size"] % config["num_attention_heads"]:
        raise CheckpointError(
            f"{file.path}: {config['num_attention_heads']} heads do not divide width {config['hidden_size']}"
        )
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise CheckpointError(
            f"{file.path} claims {config['num_hidden_layers']} layers, the limit is {_MAX_LAYERS}"
        )
    ids = {name: metadata.integer(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    return config | {
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["padding"],
    }


def _refuse_variations(metadata: GgufMetadata, architecture: str, head_dim: int) -> None:
    """Refuse what would change the result and that the models of Hugging Face do not have."""
    rope_dim = metadata.integer(f"{architecture}.rope.dimension_count")
    value_dim = metadata.integer(f"{architecture}.attention.value_length")
    window = metadata.integer(f"{architecture}.attention.sliding_window")
    if rope_dim not in (None, head_dim):
        raise UnsupportedError(f"{metadata.path}: rotary embedding of {rope_dim} of {head_dim} dimensions")
    if value_dim not in (None, head_dim):
        raise UnsupportedError(f"{metadata.path}: values of {value_dim} dimensions beside keys of {head_dim}")
    if window is not None and window < _count(metadata, f"{architecture}.context_length"):
        raise UnsupportedError(f"{metadata.path}: sliding-window attention over {window} tokens")


def _rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of transformers 5: default, linear, yarn, or llama3 (recovered from its factors)."""
    metadata, architecture = file.metadata, file.architecture
    theta = metadata.number(f"{architecture}.rope.freq_base")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0 if theta is None else theta}
    if not parameters["rope_theta"] > 0:
        raise CheckpointError(
            f"{file.path}: {architecture}.rope.freq_base is {theta}, a positive number was expected"
        )
    if ROPE_FREQS in file.tensors:
        return parameters | _llama3_rope(file, parameters["rope_theta"], head_dim)
    scaling = metadata.text(f"{architecture}.rope.scaling.type")
    match scaling:
        case None | "none":
            return parameters
        case "linear" | "yarn":
            parameters |= {
                "rope_type": scaling,
                "factor": _positive(metadata, f"{architecture}.rope.scaling.factor"),
            }
            original = metadata.integer(f"{architecture}.rope.scaling.original_context_length")
            if scaling == "yarn" and original is not None:
                parameters["original_max_position_embeddings"] = original
            return parameters
        case other:
            raise UnsupportedError(
                f"{file.path} has rope scaling {other!r}, supported are linear, yarn and llama3"
            )


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


def _count(metadata: GgufMetadata, key: str) -> int:
    if isinstance(metadata.get(key), np.ndarray):
        raise UnsupportedError(f"{metadata.path}: {key} differs between layers")
    value = metadata.integer(key)
    if value is None or value < 1:
        raise CheckpointError(f"{metadata.path}: {key} is {value}, a positive integer was expected")
    return value


def _positive(metadata: GgufMetadata, key: str) -> float:
    value = metadata.number(key)
    if value is None or not 0 < value < float("inf"):
        raise CheckpointError(f"{metadata.path}: {key} is {value}, a positive number was expected")
    return value
