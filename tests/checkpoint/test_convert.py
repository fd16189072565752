from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from fastserve.checkpoint import StoredTensor, TensorFormat
from fastserve.checkpoint.convert import to_f32

BLOCKS = (TensorFormat.Q8_0, TensorFormat.Q4_0, TensorFormat.Q4_1)


def assert_same_bits(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert np.array_equal(ours.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("format_", BLOCKS)
@pytest.mark.parametrize("shape", [(32,), (1, 32), (15, 96), (257, 64)])
def test_quantized_blocks_give_the_bits_of_the_gguf_library(
    format_: TensorFormat, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    kind = GGMLQuantizationType[format_.name]
    packed = quants.quantize(values, kind)
    ours = to_f32(StoredTensor("x", format_, shape, packed.reshape(-1)))
    assert ours.shape == shape
    assert_same_bits(ours, quants.dequantize(packed, kind))


@pytest.mark.parametrize("format_", BLOCKS)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bytes_give_the_bits_of_the_gguf_library(format_: TensorFormat, seed: int) -> None:
    packed = np.random.default_rng(seed).integers(0, 256, (4, format_.block_bytes), np.uint8)
    packed[:, 1] &= 0x7B  # scales and minima finite: arithmetic may change the bits of a NaN
    packed[:, 3] &= 0x7B
    with np.errstate(over="ignore"):
        expected = quants.dequantize(packed, GGMLQuantizationType[format_.name])
        assert_same_bits(to_f32(StoredTensor("x", format_, (4, 32), packed.reshape(-1))), expected)


@pytest.mark.parametrize(
    ("format_", "dtype"), [(TensorFormat.BF16, torch.bfloat16), (TensorFormat.F16, torch.float16)]
)
def test_every_16_bit_number_is_converted_as_by_torch(format_: TensorFormat, dtype: torch.dtype) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    ours = to_f32(StoredTensor("x", format_, bits.shape, bits.view(np.uint8)))
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    is_nan = np.isnan(expected)
    assert_same_bits(ours[~is_nan], expected[~is_nan])
    assert np.isnan(ours[is_nan]).all()


def test_unaligned_float32_is_copied_out() -> None:
    data = np.zeros(17, np.uint8)
    data[1:] = np.array([1.5, -2.0, 0.0, 3e38], np.float32).view(np.uint8)
    stored = StoredTensor("x", TensorFormat.F32, (2, 2), data[1:])
    ours = to_f32(stored)
    data[:] = 255
    assert ours.tolist() == [[1.5, -2.0], [0.0, float(np.float32(3e38))]]


@pytest.mark.parametrize(
    ("format_", "num_bytes"),
    [("F32", 256), ("F16", 128), ("BF16", 128), ("Q8_0", 68), ("Q4_0", 36), ("Q4_1", 40)],
)
def test_bytes_of_a_tensor_follow_from_its_format(format_: str, num_bytes: int) -> None:
    assert TensorFormat[format_].num_bytes((2, 32)) == num_bytes
