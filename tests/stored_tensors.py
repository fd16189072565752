"""Random tensors as files of every stored format hold them, with as many zeros as asked for."""

from __future__ import annotations

import numpy as np

from fastserve.backends.native.weight_scheme import SCHEMES, STORED_SCHEMES, WeightScheme
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from parity import store_f32

CAN_BE_SPARSE = [
    scheme
    for scheme in (*SCHEMES.values(), *STORED_SCHEMES.values())
    if scheme.is_integer and scheme.offset == "none"
]


def random_stored(stored_format: TensorFormat, shape: tuple[int, int], name: str = "weight") -> StoredTensor:
    """A tensor of random blocks whose scales are moderate numbers."""
    rng = np.random.default_rng(5)
    if stored_format is TensorFormat.F32:
        data = rng.normal(size=shape).astype(np.float32).view(np.uint8).reshape(-1)
    elif stored_format is TensorFormat.F16:
        data = rng.normal(size=shape).astype(np.float16).view(np.uint8).reshape(-1)
    elif stored_format is TensorFormat.BF16:
        data = (
            (rng.normal(size=shape).astype(np.float32).view(np.uint32) >> 16)
            .astype(np.uint16)
            .view(np.uint8)
            .reshape(-1)
        )
    else:
        blocks = rng.integers(
            0, 256, size=(shape[0] * shape[1] // 32, stored_format.block_bytes), dtype=np.uint8
        )
        num_halves = 2 if stored_format is TensorFormat.Q4_1 else 1
        halves = rng.normal(size=(len(blocks), num_halves)).astype(np.float16)
        blocks[:, : 2 * num_halves] = halves.view(np.uint8).reshape(len(blocks), -1)
        data = blocks.reshape(-1)
    return StoredTensor(name, stored_format, shape, data)


def random_with_zeros(
    scheme: WeightScheme, shape: tuple[int, int], share_of_zeros: float, name: str = "weight"
) -> StoredTensor:
    """What the scheme packs into a matrix with about as many zeros."""
    rng = np.random.default_rng(8)
    values = np.where(rng.random(shape) < share_of_zeros, 0, rng.normal(size=shape)).astype(np.float32)
    if scheme.scale_format == "bf16":
        return store_f32({name: values})[name]
    stored_format = next(f for f, s in STORED_SCHEMES.items() if s == scheme)
    stored = random_stored(stored_format, shape)
    blocks = stored.data.reshape(-1, stored_format.block_bytes).copy()
    numbers = np.asarray(blocks[:, 2:], np.uint8)
    numbers[rng.random(numbers.shape) < share_of_zeros] = 0x88 if scheme.format == "int4" else 0
    blocks[:, 2:] = numbers
    return StoredTensor(name, stored_format, shape, blocks.reshape(-1))
