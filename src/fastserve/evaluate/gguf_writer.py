"""Writes a Llama as GGUF, for llama.cpp to quantize. Format: github.com/ggml-org/ggml, docs/gguf.md."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.errors import UnsupportedError
from fastserve.models.family import read_config
from fastserve.models.llama import LlamaConfig
from fastserve.types import Float32Array

_ALIGNMENT = 32
_F32, _F16 = 0, 1  # enum ggml_type
_UINT32, _FLOAT32, _STRING = 4, 6, 8  # enum gguf_metadata_value_type

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Write the model's weights, matrices in float16, without a tokenizer: it takes and gives token ids.

    Raises:
        UnsupportedError: the model is no Llama.
    """
    config = read_config(checkpoint.config)
    if not isinstance(config, LlamaConfig) or config.model_type != "llama":
        raise UnsupportedError("only Llama models can be written as GGUF", hint="compare others")
    metadata: dict[str, str | int | float] = {
        "general.architecture": "llama",
        "general.alignment": _ALIGNMENT,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_context,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(checkpoint.config.get("rope_theta", 10000.0)),
        "tokenizer.ggml.model": "no_vocab",
    }
    tensors = {gguf_name(name): checkpoint.tensors[name] for name in checkpoint.tensors}
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    header += b"".join(_pack_text(key) + _pack_value(value) for key, value in metadata.items())
    position = 0
    for name, tensor in tensors.items():
        is_matrix = len(tensor.shape) == 2
        header += _pack_text(name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", _F16 if is_matrix else _F32, position)
        position = _align(position + math.prod(tensor.shape) * (2 if is_matrix else 4))
    with path.open("wb") as file:
        file.write(header.ljust(_align(len(header)), b"\0"))
        for name, tensor in tensors.items():
            values = to_f32(tensor)
            if ".attn_q." in name or ".attn_k." in name:
                values = interleave_halves(values, config.head_dim)
            data = values.astype(np.float16).tobytes() if values.ndim == 2 else values.tobytes()
            file.write(data.ljust(_align(len(data)), b"\0"))


def gguf_name(name: str) -> str:
    """The name that llama.cpp gives to a Llama's tensor (gguf-py, tensor_mapping.py).

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"


def interleave_halves(values: Float32Array, head_dim: int) -> Float32Array:
    """Rows of each head reordered: llama.cpp turns neighbouring rows of a head together, transformers row i
    with row i + head_dim / 2 (convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _pack_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pack_value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _pack_text(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)


def _align(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
