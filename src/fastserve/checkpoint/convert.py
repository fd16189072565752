"""Stored tensors to float32, in numpy: the reference that the native converter is tested against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.types import Float32Array


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
    return values.reshape(tensor.shape)


def _blocks(tensor: StoredTensor) -> NDArray[np.uint8]:
    return tensor.data.reshape(-1, tensor.format.block_bytes)  # [blocks, block_bytes]


def _halves(blocks: NDArray[np.uint8], start: int) -> Float32Array:
    """The float16 at byte `start` of every block [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: NDArray[np.uint8]) -> Float32Array:
    """Low nibbles, then high ones [blocks, 32]."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
