"""Small GGUF files, written by the `gguf` library: the second implementation of the format; and folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file

from fastserve.checkpoint import StoredTensor, open_checkpoint

TINY_LLAMA: dict[str, Any] = {
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def tiny_llama_tensors() -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes of a model of TINY_LLAMA."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, 64), "output_norm.weight": (64,)}
    for i in range(TINY_LLAMA["llama.block_count"]):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (64,),
            f"blk.{i}.attn_q.weight": (64, 64),
            f"blk.{i}.attn_k.weight": (32, 64),
            f"blk.{i}.attn_v.weight": (32, 64),
            f"blk.{i}.attn_output.weight": (64, 64),
            f"blk.{i}.ffn_norm.weight": (64,),
            f"blk.{i}.ffn_gate.weight": (96, 64),
            f"blk.{i}.ffn_up.weight": (96, 64),
            f"blk.{i}.ffn_down.weight": (64, 96),
        }
    return shapes


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a GGUF file of metadata and float32 tensors, matrices quantized to `kind`."""

    def write(
        metadata: dict[str, Any],
        tensors: dict[str, np.ndarray],
        *,
        architecture: str = "llama",
        kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    ) -> Path:
        path = tmp_path / "model.gguf"
        writer = GGUFWriter(path, architecture)
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, values in tensors.items():
            stored_kind = kind if values.ndim > 1 else GGMLQuantizationType.F32
            writer.add_tensor(name, quants.quantize(values, stored_kind), raw_dtype=stored_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def open_parts(tmp_path: Path) -> Callable[..., Mapping[str, StoredTensor]]:
    """The tensors of a folder with these parts and this quantization_config."""

    def open_(parts: Mapping[str, torch.Tensor], quantization: Any) -> Mapping[str, StoredTensor]:
        contiguous = {name: part.contiguous() for name, part in parts.items()}
        save_file(contiguous, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        return open_checkpoint(tmp_path).tensors

    return open_


@pytest.fixture
def write_tiny_llama(write_gguf: Callable[..., Path]) -> Callable[..., Path]:
    """Write a random model of TINY_LLAMA, with changed metadata, and tensors added or (None) left out."""

    def write(
        *,
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray | None] | None = None,
        kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    ) -> Path:
        random = np.random.default_rng(0)
        values = {
            name: random.standard_normal(shape).astype(np.float32)
            for name, shape in tiny_llama_tensors().items()
        }
        all_tensors = {k: v for k, v in {**values, **(tensors or {})}.items() if v is not None}
        all_metadata = {k: v for k, v in {**TINY_LLAMA, **(metadata or {})}.items() if v is not None}
        return write_gguf(all_metadata, all_tensors, kind=kind)

    return write


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
