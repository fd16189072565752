from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from fastserve.checkpoint import StoredTensor, TensorFormat
from fastserve.checkpoint.convert import to_f32
from stored_tensors import random_stored

BLOCKS = [format_ for format_ in TensorFormat if format_.block_elements > 1]
WRITTEN_BY_LIBRARY = [TensorFormat[name] for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")]


def assert_same_bits(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert np.array_equal(ours.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("format_", WRITTEN_BY_LIBRARY)
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
    shape = (4, 2 * format_.block_elements)
    stored = random_stored(format_, shape, seed=seed)
    packed = stored.data.reshape(4, -1)
    assert_same_bits(to_f32(stored), quants.dequantize(packed, GGMLQuantizationType[format_.name]))


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


@pytest.mark.parametrize("format_", BLOCKS)
def test_blocks_have_the_sizes_of_the_gguf_library(format_: TensorFormat) -> None:
    sizes = format_.block_elements, format_.block_bytes
    assert sizes == GGML_QUANT_SIZES[GGMLQuantizationType[format_.name]]
