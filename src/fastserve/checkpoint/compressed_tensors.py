"""Reads the formats of compressed-tensors: whole numbers as they are or packed, sparse values behind masks.

Layouts: github.com/vllm-project/compressed-tensors, compressors/{naive_quantized,pack_quantized} (0.20), and
sparse_compressors/{sparse_bitmask,sparse_24_bitmask} (until 0.11). How many bits, groups and zero points a
weight has follows from the shapes of its parts: the targets of `config_groups` are not matched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups, to_signed, unpack_bits
from fastserve.checkpoint.marlin_24 import read_marlin_24
from fastserve.checkpoint.safetensors import IntegerTensor, Part
from fastserve.checkpoint.sparse_tensor import BitmaskRows
from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor
from fastserve.checkpoint.weight_parts import UNQUANTIZED, WeightParts
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import Float32Array, JsonObject

logger = logging.getLogger(__name__)

_FORMATS = ("dense", "int-quantized", "naive-quantized", "pack-quantized", "marlin-24", "mixed-precision")
_SPARSE_FORMATS = ("dense", "sparse-bitmask", "sparse-24-bitmask")
_PACKED_BITS = (2, 4, 8)  # others were packed in two ways by different versions of the library

# Parts that only activations or keys and values need, which are quantized here by what they are at run time.
_ACTIVATION_PARTS = tuple(
    f".{what}_{part}"
    for what in ("input", "output", "k", "v", "q")
    for part in ("scale", "zero_point", "global_scale")
)


def read_compressed_tensors(folder: Path, config: JsonObject, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts of a folder, those of each compressed weight put together under its name.

    Raises:
        UnsupportedError: a format that we do not have.
        CheckpointError: parts are missing, or their shapes contradict each other.
    """
    _check_config(folder, config)
    left = dict(parts)
    left = {name: part for name, part in left.items() if not name.endswith(_ACTIVATION_PARTS)}
    if len(left) < len(parts):
        logger.info(
            "%s: %d stored scales of activations are not used: each token has scales of its own",
            folder,
            len(parts) - len(left),
        )
    found: dict[str, Part] = {}
    integers: dict[str, _Integers] = {}  # by module
    for name in _modules(left, ".compressed"):
        parts_of = WeightParts(folder, name, left)
        rows, module = _read_sparse(parts_of), name.removesuffix(".weight")
        if rows.format is None:
            integers[module] = _Integers(rows.shape, rows.read)
        else:
            found[f"{module}.weight"] = ComputedTensor(f"{module}.weight", rows.format, rows.shape, rows.read)
    for module in _modules(left, ".scale_packed"):
        found[f"{module}.weight"] = read_marlin_24(WeightParts(folder, module, left))
    for module in _modules(left, ".weight_packed"):
        found[f"{module}.weight"] = _read_packed(WeightParts(folder, module, left), _stated_bits(config))
    for module in _modules(left, ".weight_scale"):
        parts_of = WeightParts(folder, module, left)
        codes = integers.pop(module, None) or _read_codes(parts_of)
        found[f"{module}.weight"] = _read_quantized(parts_of, codes)
    if integers:
        raise CheckpointError(f"{folder}: weight_scale of {next(iter(integers))} is missing")
    return {**left, **found}


def _modules(left: Mapping[str, Part], ending: str) -> list[str]:
    return [name.removesuffix(ending) for name in left if name.endswith(ending)]


def _check_config(folder: Path, config: JsonObject) -> None:
    groups = config.get("config_groups") or {}
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{folder}: config_groups of quantization_config maps no names to objects")
    if not isinstance(sparsity, dict):
        raise CheckpointError(f"{folder}: sparsity_config of quantization_config is no object")
    for format_ in (config.get("format"), *(group.get("format") for group in groups.values())):
        _check_format(folder, format_, _FORMATS)
    _check_format(folder, sparsity.get("format"), _SPARSE_FORMATS)
    if config.get("transform_config"):
        raise UnsupportedError(
            f"{folder}: quantization_config has a transform_config, which is not supported",
            hint="choose a model that is quantized without rotations",
        )


def _check_format(folder: Path, format_: object, known: tuple[str, ...]) -> None:
    if format_ is not None and format_ not in known:
        raise UnsupportedError(
            f"{folder} is compressed as {format_!r:.80}, supported are {', '.join(known)}",
            hint=UNQUANTIZED,
        )


def _stated_bits(config: JsonObject) -> set[int]:
    """Of the weights of any group."""
    groups = (config.get("config_groups") or {}).values()
    weights = (group["weights"] for group in groups if isinstance(group.get("weights"), dict))
    return {bits for arguments in weights if type(bits := arguments.get("num_bits")) is int}


class _Scales(NamedTuple):
    """Scales and zero points [rows, groups]; one for all rows where they are one row."""

    scales: StoredTensor
    zeros: NDArray[Any] | None
    num_groups: int

    def rows(self, begin: int, end: int) -> tuple[Float32Array, NDArray[np.int8] | None]:
        is_shared = self.scales.shape[0] == 1
        scales = to_f32(self.scales if is_shared else self.scales.rows(begin, end))
        zeros = self.zeros if self.zeros is None or is_shared else self.zeros[begin:end]
        shape = (end - begin, self.num_groups)
        return (
            np.broadcast_to(scales, shape),
            None if zeros is None else np.broadcast_to(zeros, shape).astype(np.int8),
        )


class _Integers(NamedTuple):
    """A matrix of int8."""

    shape: tuple[int, int]
    read: Callable[[int, int], NDArray[Any]]  # bytes


def _read_codes(parts: WeightParts) -> _Integers:
    """`weight` of int-quantized: whole numbers as they are."""
    if isinstance(parts.peek("weight"), StoredTensor):
        raise UnsupportedError(
            f"{parts.folder}: {parts.module}.weight has floats beside scales: the model is not compressed",
            hint="compress the model (quantization_status: compressed), or take it unquantized",
        )
    codes = parts.integers("weight", "I8")
    if codes.ndim != 2:
        raise parts.contradict(f"weight has shape {list(codes.shape)}, a matrix was expected")
    return _Integers(codes.shape, lambda begin, end: codes[begin:end].reshape(-1))


def _read_quantized(parts: WeightParts, codes: _Integers) -> GroupedTensor:
    """A module of int-quantized, whose zero points have the shape of its scales."""
    depth = codes.shape[1]
    zeros = parts.optional_integers("weight_zero_point", "I8")
    scales = _read_scales(parts, codes.shape, zeros)

    def read(begin: int, end: int) -> Groups:
        of_rows, zeros_of_rows = scales.rows(begin, end)
        return Groups(codes.read(begin, end).view(np.int8).reshape(-1, depth), zeros_of_rows, of_rows)

    return _grouped(parts, codes.shape, read, scales, bits=8)


def _read_packed(parts: WeightParts, stated_bits: Collection[int]) -> GroupedTensor:
    """A module of pack-quantized: codes from 0 on in words of 32 bits, the zero points packed along rows."""
    packed = parts.integers("weight_packed", "I32")
    shape = parts.integers("weight_shape", "I64", "I32").reshape(-1).tolist()
    if packed.ndim != 2 or len(shape) != 2 or shape[0] != packed.shape[0] or min(shape) < 1:
        raise parts.contradict(f"weight_packed is {list(packed.shape)} and weight_shape {shape}")
    rows, depth = shape
    bits = _packed_bits(parts, packed.shape[1], depth, stated_bits)
    zeros = parts.optional_integers("weight_zero_point", "I32", "I8")
    if zeros is not None and zeros.dtype == np.int32:
        if zeros.ndim != 2 or zeros.shape[0] != -(-rows * bits // 32):
            raise parts.contradict(
                f"weight_zero_point is {list(zeros.shape)}, {rows} rows of {bits} bits were expected"
            )
        zeros = to_signed(unpack_bits(zeros.T, bits, rows), bits).T
    scales = _read_scales(parts, (rows, depth), zeros)

    def read(begin: int, end: int) -> Groups:
        codes = to_signed(unpack_bits(packed[begin:end], bits, depth), bits)
        of_rows, zeros_of_rows = scales.rows(begin, end)
        return Groups(codes, zeros_of_rows, of_rows)

    return _grouped(parts, (rows, depth), read, scales, bits=bits)


def _packed_bits(parts: WeightParts, num_words: int, depth: int, stated: Collection[int]) -> int:
    """Bits of a number, by the words that a row takes; of several that fit, those that the config states."""
    fitting = [
        bits for bits in range(1, 9) if num_words in (-(-depth * bits // 32), -(-depth // (32 // bits)))
    ]
    chosen = [bits for bits in fitting if bits in stated] or fitting
    if not chosen:
        raise parts.contradict(
            f"weight_packed has {num_words} words a row, whose {depth} numbers they do not hold"
        )
    if chosen[0] not in _PACKED_BITS:
        raise parts.refuse(f"packed weights of {chosen[0]} bits", ", ".join(map(str, _PACKED_BITS)))
    return chosen[0]


def _read_scales(parts: WeightParts, shape: tuple[int, int], zeros: NDArray[Any] | None) -> _Scales:
    stored = parts.floats("weight_scale")
    rows, depth = shape
    if math.prod(stored.shape) == 1:  # of the whole tensor
        stored = replace(stored, shape=(1, 1))
    if len(stored.shape) == 1 and stored.shape[0] == rows:
        stored = replace(stored, shape=(rows, 1))
    if (
        len(stored.shape) != 2
        or stored.shape[0] not in (1, rows)
        or not 1 <= stored.shape[1] <= max(depth, 1)
    ):
        raise parts.contradict(
            f"weight_scale is {list(stored.shape)} for a weight of {list(shape)}: one for all, one for each"
            " row, or one for each group of its columns were expected"
        )
    if zeros is not None and math.prod(zeros.shape) == math.prod(stored.shape):
        zeros = zeros.reshape(stored.shape)
    elif zeros is not None:
        raise parts.contradict(f"weight_zero_point is {list(zeros.shape)}, weight_scale {list(stored.shape)}")
    return _Scales(stored, zeros, stored.shape[1])


def _grouped(
    parts: WeightParts,
    shape: tuple[int, int],
    read: Callable[[int, int], Groups],
    scales: _Scales,
    *,
    bits: int,
) -> GroupedTensor:
    depth, num_groups = shape[1], scales.num_groups
    return GroupedTensor(
        f"{parts.module}.weight",
        scales.scales.format,
        shape,
        read,
        lambda: scales.zeros,
        bits=bits,
        group_size=parts.group_size(depth, num_groups),
        group_of_column=parts.group_of_column("weight_g_idx", depth, num_groups),
    )


def _read_sparse(parts: WeightParts) -> BitmaskRows:
    """Values other than zero, row by row, behind a mask of bits; `row_offsets` repeats what the mask says."""
    values = parts.any("compressed")
    if values is None or (isinstance(values, IntegerTensor) and values.dtype != "I8"):
        raise parts.contradict("compressed holds neither floats nor I8")
    bitmask = parts.integers("bitmask", "U8")
    shape = parts.integers("shape", "I64", "I32").reshape(-1).tolist()
    parts.optional_integers("row_offsets", "I64", "I32")
    if len(shape) != 2 or min(shape) < 1 or bitmask.shape != (shape[0], -(-shape[1] // 8)):
        raise parts.contradict(f"shape is {shape} and bitmask {list(bitmask.shape)}")
    return BitmaskRows(
        where=f"{parts.folder}: {parts.module}",
        shape=(shape[0], shape[1]),
        format=values.format if isinstance(values, StoredTensor) else None,
        values=values.data,
        bitmask=bitmask,
    )
