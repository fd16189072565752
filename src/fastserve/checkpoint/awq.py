"""Reads the GEMM format of AWQ: matrices of [inputs, outputs] of 4 bits, packed along the outputs, of which
eight neighbours lie in one word in an order of their own.

Layout: github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups, to_signed, unpack_bits
from fastserve.checkpoint.safetensors import Part
from fastserve.checkpoint.weight_parts import UNQUANTIZED, WeightParts, float_columns
from fastserve.errors import UnsupportedError
from fastserve.types import JsonObject

_BITS = 4
_IN_A_WORD = 32 // _BITS
_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of neighbouring outputs, in a word


def read_awq(folder: Path, config: JsonObject, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts of a folder, those of each quantized weight put together under its name.

    Raises:
        UnsupportedError: a version or number of bits that we do not have.
        CheckpointError: parts are missing, or their shapes contradict each other.
    """
    version, bits = config.get("version", "gemm"), config.get("bits", config.get("w_bit", _BITS))
    if str(version).lower() != "gemm" or bits != _BITS:
        raise UnsupportedError(
            f"{folder} has version {version!r:.80} of AWQ, bits {bits!r:.80}; supported are gemm, {_BITS}",
            hint=UNQUANTIZED,
        )
    left, found = dict(parts), {}
    for module in [name.removesuffix(".qweight") for name in left if name.endswith(".qweight")]:
        weight = _read_weight(WeightParts(folder, module, left))
        found[weight.name] = weight
    return {**left, **found}


def _read_weight(parts: WeightParts) -> GroupedTensor:
    packed, packed_zeros, scales = parts.packed_transposed()
    (num_groups, rows), depth = scales.shape, packed.shape[0]
    if packed.shape[1] * _IN_A_WORD != rows or packed_zeros.shape != (num_groups, packed.shape[1]):
        raise parts.contradict_shapes(packed, packed_zeros, scales)

    def read(begin: int, end: int) -> Groups:
        codes, zeros = (_unpack(words, begin, end) for words in (packed, packed_zeros))
        return Groups(codes.T, zeros.T, float_columns(scales, begin, end).T)

    return GroupedTensor(
        f"{parts.module}.weight",
        scales.format,
        (rows, depth),
        read,
        lambda: _unpack(packed_zeros, 0, rows),
        bits=_BITS,
        group_size=parts.group_size(depth, num_groups),
    )


def _unpack(words: NDArray[Any], begin: int, end: int) -> NDArray[np.int8]:
    """Columns `begin` up to `end` of a matrix that is packed along its rows."""
    first, last = begin // _IN_A_WORD, -(-end // _IN_A_WORD)
    numbers = unpack_bits(words[:, first:last], _BITS, (last - first) * _IN_A_WORD)
    in_order = numbers.reshape(len(words), -1, _IN_A_WORD)[:, :, _PLACES].reshape(len(words), -1)
    start = first * _IN_A_WORD
    return to_signed(in_order[:, begin - start : end - start], _BITS)
