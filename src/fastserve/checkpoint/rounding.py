"""Weights as whole numbers with scales: those of formats that are such already, exactly, and rounded ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.types import Float32Array

# Bits of the whole numbers that a block's elements are a float16 scale times.
_BITS_OF_BLOCKS = {TensorFormat.Q4_0: 4, TensorFormat.Q5_0: 5, TensorFormat.Q8_0: 8, TensorFormat.IQ4_NL: 8}


def as_grouped(tensor: StoredTensor) -> GroupedTensor | None:
    """A matrix as the whole numbers and scales that it is stored as; None where it is not stored so."""
    if isinstance(tensor, GroupedTensor):
        return tensor
    bits = _BITS_OF_BLOCKS.get(tensor.format)
    if bits is None or len(tensor.shape) != 2:
        return None
    depth, size = tensor.shape[1], tensor.format.block_elements

    def read(begin: int, end: int) -> Groups:
        blocks = tensor.rows(begin, end).data.reshape(-1, tensor.format.block_bytes)
        scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        ones = blocks.copy()
        ones[:, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        codes = to_f32(StoredTensor(tensor.name, tensor.format, (end - begin, depth), ones.reshape(-1)))
        return Groups(codes.astype(np.int8), None, scales.reshape(end - begin, depth // size))

    return GroupedTensor(
        tensor.name,
        TensorFormat.F16,
        (tensor.shape[0], depth),
        read,
        lambda: None,
        bits=bits,
        group_size=size,
    )


def less_zeros(tensor: GroupedTensor) -> GroupedTensor | None:
    """The same numbers without zero points, which are taken off; None where that needs more than 8 bits."""
    if not tensor.has_zeros():
        return tensor
    if tensor.bits > 7:
        return None
    of_column = np.arange(tensor.shape[1]) // tensor.group_size

    def read(begin: int, end: int) -> Groups:
        groups = tensor.groups(begin, end)
        return (
            groups
            if groups.zeros is None
            else Groups(groups.codes - groups.zeros[:, of_column], None, groups.scales)
        )

    return GroupedTensor(
        tensor.name,
        tensor.format,
        (tensor.shape[0], tensor.shape[1]),
        read,
        lambda: None,
        bits=tensor.bits + 1,
        group_size=tensor.group_size,
    )


def round_to_groups(
    tensor: StoredTensor, *, bits: int, group_size: int, scale_format: TensorFormat
) -> GroupedTensor:
    """A matrix rounded to nearest: codes from -127 or -8 on, scales by the largest magnitude of a group.

    Args:
        group_size: columns of a group; 0, or one that is no divisor of the columns: whole rows.

    Source of the scales: calculate_qparams of compressed-tensors, quantization/utils/helpers.py (symmetric).
    """
    rows, depth = tensor.shape
    size = group_size if group_size and depth % group_size == 0 else depth
    low, high = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def read(begin: int, end: int) -> Groups:
        values = to_f32(tensor.rows(begin, end)).reshape(end - begin, depth // size, size)
        largest = np.abs(values).max(axis=2)
        stored = to_float_format(largest / np.float32((high - low) / 2), scale_format)
        scales = to_f32(StoredTensor("", scale_format, largest.shape, stored))
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
        codes = np.clip(np.rint(values * inverse[:, :, None]), low, high)
        return Groups(codes.astype(np.int8).reshape(end - begin, depth), None, scales)

    return GroupedTensor(
        tensor.name, scale_format, (rows, depth), read, lambda: None, bits=bits, group_size=size
    )


def scales_fit(tensor: GroupedTensor, scale_format: TensorFormat) -> bool:
    """Whether all scales are numbers of the format: they are read."""
    if tensor.format is scale_format:
        return True
    return all(
        np.array_equal(_in_format(groups.scales, scale_format), groups.scales)
        for groups in (tensor.groups(*piece) for piece in row_pieces(tensor.shape))
    )


def _in_format(values: Float32Array, stored_format: TensorFormat) -> Float32Array:
    return to_f32(StoredTensor("", stored_format, values.shape, to_float_format(values, stored_format)))


_ELEMENTS_AT_A_TIME = 2**22


def row_pieces(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Consecutive ranges of rows, of some million elements each, so that memory stays small."""
    rows = shape[0] if shape else 1
    step = max(_ELEMENTS_AT_A_TIME // max(int(np.prod(shape[1:], dtype=np.int64)), 1), 1)
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def pack_bits(numbers: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Numbers from 0 on of 4 or 8 bits, packed along the last dimension into words of 32, the first lowest.

    >>> pack_bits(np.arange(8, dtype=np.uint8)[None], 4).tolist() == [[0x76543210]]
    True
    """
    padding = [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % (32 // bits))]
    padded = np.pad(numbers.astype(np.uint8), padding)
    packed = padded if bits == 8 else padded[..., 0::2] | padded[..., 1::2] << np.uint8(4)
    return np.ascontiguousarray(packed).view(np.int32)
