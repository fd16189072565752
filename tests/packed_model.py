"""Weights of whole numbers, and folders that hold them in a sidecar."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups
from fastserve.checkpoint.model_files import write_model_files
from fastserve.checkpoint.packed_weights import PackedSizes, packed_config, write_packed
from fastserve.checkpoint.rounding import round_to_groups
from fastserve.checkpoint.safetensors_writer import floats, write_safetensors
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.types import Float32Array


def in_format(values: Float32Array, stored_format: TensorFormat) -> Float32Array:
    return to_f32(StoredTensor("", stored_format, values.shape, to_float_format(values, stored_format)))


def grouped_of(
    codes: NDArray[np.int8],
    scales: Float32Array,
    zeros: NDArray[np.int8] | None = None,
    *,
    bits: int,
    group_size: int,
    name: str = "a.weight",
    scale_format: TensorFormat = TensorFormat.BF16,
    group_of_column: NDArray[np.int32] | None = None,
) -> GroupedTensor:
    return GroupedTensor(
        name,
        scale_format,
        (codes.shape[0], codes.shape[1]),
        lambda begin, end: Groups(
            codes[begin:end], None if zeros is None else zeros[begin:end], scales[begin:end]
        ),
        lambda: zeros,
        bits=bits,
        group_size=group_size,
        group_of_column=group_of_column,
    )


def random_grouped(
    rows: int,
    depth: int,
    *,
    bits: int,
    group_size: int,
    share_of_zeros: float = 0.0,
    is_asymmetric: bool = False,
    scale_format: TensorFormat = TensorFormat.BF16,
    seed: int = 0,
    name: str = "a.weight",
    empty_columns: float = 0.0,
) -> GroupedTensor:
    """Random codes and scales, with about this share of elements that stand for zero."""
    rng = np.random.default_rng(seed)
    lowest = -(2 ** (bits - 1))
    num_groups = -(-depth // group_size)
    codes = rng.integers(lowest, -lowest, (rows, depth)).astype(np.int8)
    zeros = None
    if is_asymmetric:
        zeros = rng.integers(lowest, -lowest, (rows, num_groups)).astype(np.int8)
    is_pruned = rng.random((rows, depth)) < share_of_zeros
    is_pruned |= rng.random(depth) < empty_columns
    of_column = np.arange(depth) // group_size
    codes = np.where(is_pruned, 0 if zeros is None else zeros[:, of_column], codes).astype(np.int8)
    scales = in_format(rng.uniform(0.01, 0.1, (rows, num_groups)).astype(np.float32), scale_format)
    return grouped_of(
        codes, scales, zeros, bits=bits, group_size=group_size, name=name, scale_format=scale_format
    )


def write_sidecar(folder: Path, weights: Mapping[str, GroupedTensor]) -> PackedSizes:
    """A folder with nothing but packed weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": packed_config()}))
    return write_packed(folder, weights)


def pack_model(
    source: Path, output: Path, make: Callable[[StoredTensor], GroupedTensor | None]
) -> PackedSizes:
    """A model in another folder, the matrices that `make` gives packed, the other tensors as they are."""
    checkpoint = open_checkpoint(source)
    made = {name: make(tensor) for name, tensor in checkpoint.tensors.items()}
    packed = {name: weight for name, weight in made.items() if weight is not None}
    others = [floats(t, t.format) for name, t in checkpoint.tensors.items() if name not in packed]
    output.mkdir()
    write_model_files(checkpoint, output)
    config = {**checkpoint.config, "quantization_config": packed_config()}
    (output / "config.json").write_text(json.dumps(config))
    write_safetensors(output / "model.safetensors", others)
    return write_packed(output, packed)


def pruned(
    tensor: StoredTensor, *, share_of_zeros: float, bits: int, group_size: int, scale_format: TensorFormat
) -> GroupedTensor:
    """A matrix rounded to nearest, its smallest numbers zero; scales are such that each row, or group, has
    the largest code, so that rounding what it dequantizes to gives the same numbers again."""
    values = to_f32(tensor)
    values[np.abs(values) < np.quantile(np.abs(values), share_of_zeros)] = 0
    rounded = round_to_groups(
        StoredTensor(tensor.name, TensorFormat.F32, tensor.shape, values.reshape(-1).view(np.uint8)),
        bits=bits,
        group_size=group_size,
        scale_format=scale_format,
    )
    groups = rounded.groups(0, rounded.shape[0])
    return grouped_of(
        groups.codes,
        groups.scales,
        bits=bits,
        group_size=rounded.group_size,
        name=tensor.name,
        scale_format=scale_format,
    )
