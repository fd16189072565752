"""Random tensors as files of every stored format hold them, with as many zeros as asked for."""

from __future__ import annotations

import numpy as np

from fastserve.backends.native.weight_scheme import SCHEMES, STORED_SCHEMES, WeightScheme
from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.types import Float32Array
from parity import store_f32

CAN_BE_SPARSE = [
    scheme
    for scheme in dict.fromkeys((*SCHEMES.values(), *STORED_SCHEMES.values()))
    if scheme.is_integer and scheme.offset == "none"
]

# Where the float16 numbers of a block are, in bytes; else the first two.
_HALVES_AT = {
    TensorFormat.Q4_1: (0, 2),
    TensorFormat.Q5_1: (0, 2),
    TensorFormat.Q2_K: (80, 82),
    TensorFormat.Q3_K: (108,),
    TensorFormat.Q4_K: (0, 2),
    TensorFormat.Q5_K: (0, 2),
    TensorFormat.Q6_K: (208,),
}


def whole_blocks(stored_format: TensorFormat, depth: int) -> int:
    """The least depth from `depth` on that the format can have."""
    return -(-depth // stored_format.block_elements) * stored_format.block_elements


def random_stored(
    stored_format: TensorFormat, shape: tuple[int, int], name: str = "weight", *, seed: int = 5
) -> StoredTensor:
    """A tensor of random blocks whose scales are moderate numbers."""
    rng = np.random.default_rng(seed)
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
        num_blocks = shape[0] * shape[1] // stored_format.block_elements
        blocks = rng.integers(0, 256, size=(num_blocks, stored_format.block_bytes), dtype=np.uint8)
        for at in _HALVES_AT.get(stored_format, (0,)):
            blocks[:, at : at + 2] = rng.normal(size=(num_blocks, 1)).astype(np.float16).view(np.uint8)
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


def random_grouped(
    scale_format: TensorFormat,
    shape: tuple[int, int],
    *,
    bits: int,
    group_size: int,
    is_asymmetric: bool = False,
    name: str = "weight",
) -> GroupedTensor:
    """Random whole numbers with scales of a format, and perhaps zero points."""
    rng = np.random.default_rng(6)
    rows, depth = shape
    groups, limit = -(-depth // group_size), 2 ** (bits - 1)
    codes = rng.integers(-limit, limit, shape).astype(np.int8)
    zeros = rng.integers(-limit, limit, (rows, groups)).astype(np.int8) if is_asymmetric else None
    halves = StoredTensor(
        "scales",
        scale_format,
        (rows, groups),
        to_float_format((rng.random((rows, groups)) * 0.1 + 0.01).astype(np.float32), scale_format),
    )
    scales = to_f32(halves)
    return GroupedTensor(
        name,
        scale_format,
        shape,
        lambda begin, end: Groups(
            codes[begin:end], None if zeros is None else zeros[begin:end], scales[begin:end]
        ),
        lambda: zeros,
        bits=bits,
        group_size=group_size,
    )


def exact_values(tensor: GroupedTensor) -> Float32Array:
    """What its whole numbers and scales stand for, products not rounded."""
    codes, zeros, scales = tensor.groups(0, tensor.shape[0])
    of_column = np.arange(tensor.shape[1]) // tensor.group_size
    values = codes.astype(np.float32) - (0 if zeros is None else zeros.astype(np.float32)[:, of_column])
    return np.asarray(values * scales[:, of_column], np.float32)
