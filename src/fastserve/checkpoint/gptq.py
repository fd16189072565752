"""Reads the format of GPTQ: matrices of [inputs, outputs], packed along the inputs.

Layout: github.com/ModelCloud/GPTQModel, nn_modules/qlinear (checkpoint_format gptq_v2), and
github.com/AutoGPTQ/AutoGPTQ, nn_modules/qlinear (gptq, the first version: zero points are stored less one,
and one is added within the bits of a number).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups, to_signed, unpack_bits
from fastserve.checkpoint.safetensors import Part
from fastserve.checkpoint.weight_parts import UNQUANTIZED, WeightParts, float_columns
from fastserve.errors import UnsupportedError
from fastserve.types import JsonObject

_BITS = (2, 4, 8)


def read_gptq(folder: Path, config: JsonObject, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts of a folder, those of each quantized weight put together under its name.

    Raises:
        UnsupportedError: a version or number of bits that we do not have.
        CheckpointError: parts are missing, or their shapes contradict each other.
    """
    version = config.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UnsupportedError(
            f"{folder} has checkpoint_format {version!r:.80}, supported are gptq, gptq_v2", hint=UNQUANTIZED
        )
    left, found = dict(parts), {}
    for module in [name.removesuffix(".qweight") for name in left if name.endswith(".qweight")]:
        weight = _read_weight(WeightParts(folder, module, left), is_first_version=version == "gptq")
        found[weight.name] = weight
    return {**left, **found}


def _read_weight(parts: WeightParts, *, is_first_version: bool) -> GroupedTensor:
    packed, packed_zeros, scales = parts.packed_transposed()
    num_groups, rows = scales.shape
    bits = 32 * packed_zeros.shape[1] // max(rows, 1)
    if bits not in _BITS:
        raise parts.refuse(f"weights of {bits} bits", ", ".join(map(str, _BITS)))
    depth = packed.shape[0] * 32 // bits
    if packed.shape[1] != rows or packed_zeros.shape != (num_groups, -(-rows * bits // 32)):
        raise parts.contradict_shapes(packed, packed_zeros, scales)

    def read_zeros() -> NDArray[np.int8]:  # [groups, rows]
        zeros = unpack_bits(packed_zeros, bits, rows)
        if is_first_version:
            zeros = zeros + np.uint8(1) & np.uint8(2**bits - 1)
        return to_signed(zeros, bits)

    def read(begin: int, end: int) -> Groups:
        codes = to_signed(unpack_bits(packed[:, begin:end].T, bits, depth), bits)
        return Groups(codes, read_zeros()[:, begin:end].T, float_columns(scales, begin, end).T)

    return GroupedTensor(
        f"{parts.module}.weight",
        scales.format,
        (rows, depth),
        read,
        read_zeros,
        bits=bits,
        group_size=parts.group_size(depth, num_groups),
        group_of_column=parts.group_of_column("g_idx", depth, num_groups),
    )
