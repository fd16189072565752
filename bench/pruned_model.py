"""Makes a packed model out of another: its matrices pruned by magnitude and rounded to nearest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.convert import to_bf16, to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.model_files import write_model_files
from fastserve.checkpoint.packed_weights import PackedSizes, packed_config, write_packed
from fastserve.checkpoint.rounding import round_to_groups, row_pieces
from fastserve.checkpoint.safetensors_writer import floats, write_safetensors
from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor, TensorFormat
from fastserve.models.matrices import find_matrices
from fastserve.types import UInt8Array


@dataclass(frozen=True)
class Rounding:
    """How matrices are rounded: `group_size` 0 is whole rows."""

    bits: int
    group_size: int


def write_pruned(
    checkpoint: Checkpoint, folder: Path, *, zeros: float, linears: Rounding, tables: Rounding
) -> PackedSizes:
    """Write a model whose linears have that share of zeros; embeddings and the head keep theirs. Some rows
    are in memory at a time."""
    matrices = find_matrices(checkpoint)
    packed, others = {}, []
    for name, tensor in checkpoint.tensors.items():
        if name in matrices.linears:
            packed[name] = _round(_prune(tensor, zeros) if zeros else tensor, linears)
        elif name in matrices.tables:
            packed[name] = _round(tensor, tables)
        else:
            stored = tensor.format if tensor.format.block_elements == 1 else TensorFormat.BF16
            others.append(floats(tensor, stored))
    folder.mkdir(parents=True)
    write_model_files(checkpoint, folder)
    config = {**checkpoint.config, "quantization_config": packed_config()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", others)
    return write_packed(folder, packed)


def _round(tensor: StoredTensor, rounding: Rounding) -> GroupedTensor:
    return round_to_groups(
        tensor, bits=rounding.bits, group_size=rounding.group_size, scale_format=TensorFormat.BF16
    )


def _prune(tensor: StoredTensor, zeros: float) -> StoredTensor:
    """The matrix without its smallest magnitudes: those of one bfloat16 go or stay together."""
    counts = np.zeros(2**15, np.int64)
    for begin, end in row_pieces(tensor.shape):
        magnitudes = to_bf16(np.abs(to_f32(tensor.rows(begin, end)))).reshape(-1)
        counts += np.bincount(magnitudes, minlength=2**15)
    wanted = zeros * counts.sum()
    least_kept = np.searchsorted(np.cumsum(counts), wanted, side="left")

    def compute(begin: int, end: int) -> UInt8Array:
        values = to_f32(tensor.rows(begin, end))
        values[to_bf16(np.abs(values)) <= least_kept] = 0
        return values.reshape(-1).view(np.uint8)

    return ComputedTensor(tensor.name, TensorFormat.F32, tensor.shape, compute)
