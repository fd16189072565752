"""Tensors as blocks of GGUF: whole numbers with scales moved where a format holds them, else rounded as the
`gguf` library rounds (gguf-py/gguf/quants.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups
from fastserve.checkpoint.rounding import less_zeros, row_pieces, scales_fit
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.types import Float32Array

BLOCK = 32  # elements of the formats that are written


def exact_blocks(tensor: GroupedTensor) -> TensorFormat | None:
    """The smallest format that holds the tensor's whole numbers, less their zero points, and scales exactly:
    blocks of a group repeat its scale. None where there is none.
    """
    depth = tensor.shape[1]
    divides = depth % BLOCK == 0 and (tensor.group_size % BLOCK == 0 or tensor.group_size >= depth)
    if not divides or tensor.group_of_column is not None:
        return None
    bits = tensor.bits + tensor.has_zeros()
    if bits > 8 or not scales_fit(tensor, TensorFormat.F16):
        return None
    return TensorFormat.Q4_0 if bits <= 4 else TensorFormat.Q5_0 if bits == 5 else TensorFormat.Q8_0


def move_to_blocks(tensor: GroupedTensor, stored_format: TensorFormat) -> Iterable[NDArray[np.uint8]]:
    """The bytes of a tensor in the format that `exact_blocks` found."""
    tensor = less_zeros(tensor) or tensor
    for begin, end in row_pieces(tensor.shape):
        groups = tensor.groups(begin, end)
        codes = groups.codes.astype(np.int16).reshape(-1, BLOCK)
        yield _pack(codes, _scales_of_blocks(groups, tensor), stored_format)


def round_to_blocks(tensor: StoredTensor, stored_format: TensorFormat) -> Iterable[NDArray[np.uint8]]:
    """The bytes of a tensor in a format of single numbers, or rounded to Q8_0 or Q4_0."""
    for begin, end in row_pieces(tensor.shape):
        rows = tensor.rows(begin, end)
        if tensor.format is stored_format:
            yield rows.data
        elif stored_format.block_elements == 1:
            yield to_float_format(to_f32(rows), stored_format)
        else:
            yield _round(to_f32(rows).reshape(-1, BLOCK), stored_format)


def _scales_of_blocks(groups: Groups, tensor: GroupedTensor) -> Float32Array:
    first_columns = np.arange(0, tensor.shape[1], BLOCK)
    return groups.scales[:, first_columns // tensor.group_size].reshape(-1, 1)


def _round(values: Float32Array, stored_format: TensorFormat) -> NDArray[np.uint8]:
    if stored_format is TensorFormat.Q8_0:
        scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
        return _pack(_round_half_away(values * _inverse(scales)).astype(np.int16), scales, stored_format)
    assert stored_format is TensorFormat.Q4_0, f"nothing is rounded to {stored_format}"
    # Nibbles reach from -8 to 7: the number of the largest magnitude becomes -8.
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    scales = largest / np.float32(-8)
    codes = np.trunc(values * _inverse(scales) + np.float32(8.5)).clip(0, 15)
    return _pack(codes.astype(np.int16) - 8, scales, stored_format)


def _inverse(scales: Float32Array) -> Float32Array:
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


def _round_half_away(values: Float32Array) -> Float32Array:
    magnitudes = np.abs(values)
    whole = np.floor(magnitudes)
    rounded: Float32Array = np.sign(values) * (whole + np.floor(2 * (magnitudes - whole)))
    return rounded


def _pack(codes: NDArray[np.int16], scales: Float32Array, stored_format: TensorFormat) -> NDArray[np.uint8]:
    """Codes [blocks, 32] and scales [blocks, 1] as the format lays them out."""
    halves = scales.astype(np.float16).view(np.uint8).reshape(len(codes), 2)
    if stored_format is TensorFormat.Q8_0:
        parts = [halves, codes.astype(np.int8).view(np.uint8)]
    elif stored_format is TensorFormat.Q4_0:
        parts = [halves, _nibbles((codes + 8).astype(np.uint8))]
    else:
        numbers = (codes + 16).astype(np.uint8)
        fifth = np.packbits(numbers >> np.uint8(4), axis=1, bitorder="little")
        parts = [halves, fifth, _nibbles(numbers & np.uint8(15))]
    return np.concatenate(parts, axis=1).reshape(-1)


def _nibbles(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return numbers[:, :16] | numbers[:, 16:] << np.uint8(4)
