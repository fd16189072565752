"""Stored tensors to float32, in numpy: the reference that the native converter is tested against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.types import Float32Array

_IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # kvalues_iq4nl of ggml-common.h


def to_f32(tensor: StoredTensor) -> Float32Array:
    """The tensor's values as float32 in its shape, a fresh array. Exact for F16 and BF16; block formats are
    computed in float32, in the order of operations of ggml (ggml-quants.c, dequantize_row_*).
    """
    match tensor.format:
        case TensorFormat.F32:
            values = tensor.data.view("<f4").astype(np.float32)
        case TensorFormat.F16:
            values = tensor.data.view("<f2").astype(np.float32)
        case TensorFormat.BF16:  # the upper half of a float32
            values = (tensor.data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        case TensorFormat.Q8_0:
            blocks = _blocks(tensor)
            values = _halves(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)
        case TensorFormat.Q4_0:
            blocks = _blocks(tensor)
            values = _halves(blocks, 0) * (_nibbles(blocks[:, 2:]) - np.float32(8))
        case TensorFormat.Q4_1:
            blocks = _blocks(tensor)
            values = _halves(blocks, 0) * _nibbles(blocks[:, 4:]) + _halves(blocks, 2)
        case TensorFormat.Q5_0:
            blocks = _blocks(tensor)
            values = _halves(blocks, 0) * (_five_bits(blocks[:, 2:]) - np.float32(16))
        case TensorFormat.Q5_1:
            blocks = _blocks(tensor)
            values = _halves(blocks, 0) * _five_bits(blocks[:, 4:]) + _halves(blocks, 2)
        case TensorFormat.IQ4_NL:
            blocks = _blocks(tensor)
            values = _halves(blocks, 0) * _IQ4_VALUES[_nibbles(blocks[:, 2:]).astype(np.intp)]
        case TensorFormat.Q2_K:
            values = _q2_k(_blocks(tensor))
        case TensorFormat.Q3_K:
            values = _q3_k(_blocks(tensor))
        case TensorFormat.Q4_K:
            blocks = _blocks(tensor)
            values = _scaled_less_minimum(blocks, _low_then_high(blocks[:, 16:], 32))
        case TensorFormat.Q5_K:
            blocks = _blocks(tensor)
            fifth = _bits(blocks[:, 16:48], range(8))  # bit g of byte i belongs to element 32 * g + i
            values = _scaled_less_minimum(blocks, _low_then_high(blocks[:, 48:], 32) | fifth << 4)
        case TensorFormat.Q6_K:
            values = _q6_k(_blocks(tensor))
    return values.reshape(tensor.shape)


def to_bf16(values: Float32Array) -> NDArray[np.uint16]:
    """The upper halves of the numbers, rounded to nearest even.

    >>> to_bf16(np.asarray([1.0], np.float32)).tolist() == [0x3F80]
    True
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(halves: NDArray[np.uint16]) -> Float32Array:
    """The numbers whose upper halves these are.

    >>> from_bf16(np.asarray([0x3F80], np.uint16)).tolist()
    [1.0]
    """
    return (halves.astype(np.uint32) << 16).view(np.float32)


def to_float_format(values: Float32Array, stored_format: TensorFormat) -> NDArray[np.uint8]:
    """The bytes of numbers as F32, F16 or BF16, rounded to nearest even."""
    match stored_format:
        case TensorFormat.F32:
            stored: NDArray[np.generic] = np.ascontiguousarray(values, np.float32)
        case TensorFormat.F16:
            with np.errstate(over="ignore"):
                stored = values.astype(np.float16)
        case TensorFormat.BF16:
            stored = to_bf16(values)
        case _:
            raise ValueError(f"{stored_format} is no format of single numbers")
    return stored.reshape(-1).view(np.uint8)


def _blocks(tensor: StoredTensor) -> NDArray[np.uint8]:
    return tensor.data.reshape(-1, tensor.format.block_bytes)  # [blocks, block_bytes]


def _halves(blocks: NDArray[np.uint8], start: int) -> Float32Array:
    """The float16 at byte `start` of every block [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: NDArray[np.uint8]) -> Float32Array:
    """Low nibbles, then high ones [blocks, 32]."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _five_bits(packed: NDArray[np.uint8]) -> Float32Array:
    """A word of the fifth bits, then nibbles [blocks, 32]."""
    fifth = np.unpackbits(packed[:, :4], axis=1, bitorder="little")
    return _nibbles(packed[:, 4:]) + np.float32(16) * fifth


def _low_then_high(packed: NDArray[np.uint8], run: int) -> NDArray[np.uint8]:
    """Nibbles of runs of bytes: the low ones of a run, then its high ones [blocks, 2 * bytes]."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def _bits(packed: NDArray[np.uint8], places: range, mask: int = 1) -> NDArray[Any]:
    """The bits at each place of all bytes, one place after the other [blocks, places * bytes]."""
    return np.concatenate([packed >> place & mask for place in places], axis=1)


def _pairs_of_bits(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first two bits of each of 32 bytes, then the next, ...; then of the last 32 bytes [blocks, 256]."""
    return np.concatenate([_bits(half, range(0, 8, 2), 3) for half in np.split(packed, 2, axis=1)], axis=1)


def _grouped(scales: Float32Array, values: NDArray[np.generic]) -> Float32Array:
    """Scales [blocks, groups] times values [blocks, 256], those of a group being neighbours."""
    groups = values.astype(np.float32).reshape(*scales.shape, -1)
    return (scales[..., None] * groups).reshape(len(values), -1)


def _q2_k(blocks: NDArray[np.uint8]) -> Float32Array:
    scales = _halves(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    minimums = _halves(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    return _grouped(scales, _pairs_of_bits(blocks[:, 16:80])) - np.repeat(minimums, 16, axis=1)


def _q3_k(blocks: NDArray[np.uint8]) -> Float32Array:
    packed = blocks[:, 96:108]
    six_bits = _low_then_high(packed[:, :8], 8) | _bits(packed[:, 8:], range(0, 8, 2), 3) << 4
    scales = _halves(blocks, 108) * (six_bits.astype(np.float32) - np.float32(32))
    third = _bits(blocks[:, :32], range(8))  # set where four is not taken off
    return _grouped(scales, _pairs_of_bits(blocks[:, 32:96]).astype(np.int8) + third.astype(np.int8) * 4 - 4)


def _scaled_less_minimum(blocks: NDArray[np.uint8], values: NDArray[Any]) -> Float32Array:
    """Of Q4_K and Q5_K: eight groups with scales and minimums of six bits."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    six_bits = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    six_bits_of_minimums = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    scales = _halves(blocks, 0) * six_bits.astype(np.float32)
    minimums = _halves(blocks, 2) * six_bits_of_minimums.astype(np.float32)
    return _grouped(scales, values) - np.repeat(minimums, 32, axis=1)


def _q6_k(blocks: NDArray[np.uint8]) -> Float32Array:
    scales = _halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values = _low_then_high(blocks[:, :128], 64) | _pairs_of_bits(blocks[:, 128:192]) << 4
    return _grouped(scales, values.astype(np.int8) - 32)
