"""Writes a model as a folder of plain numbers: config.json, model.safetensors, and what comes along."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.conversion import FLOATS, Conversion, ConvertedWeights, Matrices
from fastserve.checkpoint.model_files import write_model_files
from fastserve.checkpoint.safetensors_writer import WrittenTensor, floats, write_safetensors
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.errors import OptionError
from fastserve.types import JsonObject

_OF_THE_SOURCE = ("quantization_config", "compression_config", "torch_dtype", "dtype")
_DTYPES = {TensorFormat.F32: "float32", TensorFormat.F16: "float16", TensorFormat.BF16: "bfloat16"}


def to_safetensors(
    checkpoint: Checkpoint,
    weights: ConvertedWeights,
    folder: Path,
    matrices: Matrices,
    conversion: Conversion,
) -> None:
    if weights != "auto" and weights not in FLOATS:
        raise OptionError(
            f"safetensors hold plain numbers, not weights={weights!r}",
            hint="use --to compressed-tensors, or --weights auto, f32, f16 or bf16",
        )
    written = []
    for tensor in checkpoint.tensors.values():
        stored_format = FLOATS.get(weights, tensor.format)
        if stored_format.block_elements > 1:
            stored_format = TensorFormat.BF16
        conversion.note_floats(tensor, stored_format)
        written.append(floats(tensor, stored_format))
    largest = max(written, key=lambda tensor: tensor.num_bytes)
    write_folder(checkpoint, folder, written, TensorFormat[largest.dtype], None)


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    written: Sequence[WrittenTensor],
    dtype: TensorFormat,
    quantization: JsonObject | None,
) -> None:
    """Write tensors, with the files that come along; numbers that a model computes with are of `dtype`."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _OF_THE_SOURCE}
    config["torch_dtype"] = _DTYPES[dtype]  # transformers 5 reads it as `dtype` too
    if quantization is not None:
        config["quantization_config"] = quantization
    write_model_files(checkpoint, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", written)
