"""Packing: every stored format into every weight format, seen through the rows `embedding` reads back."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native.executable import compile_native, make_runtime
from fastserve.backends.native.weights import INT8_GROUP_SIZE
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import OptionError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph
from fastserve.graph.passes import merge_linears
from fastserve.types import Float32Array, Limits
from parity import run_logits, store_f32

ISAS = _native.runnable_isas()


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


def read_back(stored: StoredTensor, weights: str, isa: str) -> Float32Array:
    """The rows of a packed weight, as `embedding` dequantizes them."""
    rows, depth = stored.shape
    b = GraphBuilder()
    graph = b.finish(logits=b.gather_rows(b.embedding("token_ids", stored.name, size=rows, width=depth)))
    limits = Limits(max_tokens=rows, max_outputs=rows, max_context=rows, num_blocks=4 * -(-rows // 32))
    executable = compile_native(graph, {stored.name: stored}, weights=weights, limits=limits, isa=isa)  # type: ignore[arg-type]
    return run_logits(executable, range(rows))


def to_bf16(x: Float32Array) -> Float32Array:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def quantize_int8(x: Float32Array) -> Float32Array:
    """What int8 weights stand for: rounded to multiples of a bfloat16 scale per row."""
    scale = to_bf16((np.abs(x).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32))
    return np.rint(x * (np.float32(1) / scale)) * scale


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("stored_format", list(TensorFormat))
def test_every_stored_format_is_packed_exactly_as_float32(
    stored_format: TensorFormat, rows: int, isa: str
) -> None:
    stored = random_stored(stored_format, (rows, 96))
    np.testing.assert_array_equal(read_back(stored, "f32", isa), to_f32(stored))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", [1, 15, 63, 64, 65, 172, 257])
def test_bf16_rounds_to_nearest_even(depth: int, isa: str) -> None:
    stored = random_stored(TensorFormat.F32, (70, depth))
    np.testing.assert_array_equal(read_back(stored, "bf16", isa), to_bf16(to_f32(stored)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", [1, 15, 63, 64, 65, 172, 257])
def test_int8_rounds_to_multiples_of_the_scale_of_its_row(depth: int, isa: str) -> None:
    stored = random_stored(TensorFormat.F32, (70, depth))
    np.testing.assert_array_equal(read_back(stored, "int8", isa), quantize_int8(to_f32(stored)))


def test_int8_keeps_rows_of_zeros_and_the_largest_magnitudes() -> None:
    weights = np.zeros((3, 64), np.float32)
    weights[1, 5], weights[2] = -3e38, 1e-38
    packed = read_back(store_f32({"weight": weights})["weight"], "int8", ISAS[0])
    assert not packed[0].any()
    np.testing.assert_allclose(packed, weights, rtol=0.005, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", [1, 15, 63, 64, 65, 172, 257])
@pytest.mark.parametrize("width", [1, 17, 64, 130])
def test_int8_linear_is_the_product_of_the_quantized_operands(depth: int, width: int, isa: str) -> None:
    rng = np.random.default_rng(11)
    x = rng.normal(size=(20, depth)).astype(np.float32) * 5
    weight = rng.normal(size=(width, depth)).astype(np.float32)
    b = GraphBuilder()
    y = b.linear(b.embedding("token_ids", "x", size=20, width=depth), "weight", width=width)
    graph = b.finish(logits=b.gather_rows(y))
    limits = Limits(max_tokens=20, max_context=20, num_blocks=4)
    executable = compile_native(
        graph, store_f32({"x": x, "weight": weight}), weights="int8", limits=limits, isa=isa
    )
    seen = quantize_int8(x)  # the embedding is int8 too
    expected = quantize_activations(seen) @ quantize_int8(weight).astype(np.float64).T
    actual = run_logits(executable, range(20))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def quantize_activations(x: Float32Array) -> np.ndarray:
    out = np.empty(x.shape, np.float64)
    for begin in range(0, x.shape[1], INT8_GROUP_SIZE):
        group = x[:, begin : begin + INT8_GROUP_SIZE]
        largest = np.abs(group).max(axis=1, keepdims=True)
        inverse = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
        out[:, begin : begin + INT8_GROUP_SIZE] = np.rint(group * inverse) * (largest / np.float32(127))
    return out


def merged_graph() -> Graph:
    b = GraphBuilder()
    x = b.embedding("token_ids", "x", size=9, width=64)
    q, k = b.linear(x, "q", width=40), b.linear(x, "k", width=40)
    return b.finish(logits=b.gather_rows(b.add(q, k)))


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8"])
def test_merged_linears_of_different_stored_formats_give_what_they_gave_apart(weights: str) -> None:
    tensors = {
        "x": random_stored(TensorFormat.F16, (9, 64), "x"),
        "q": random_stored(TensorFormat.Q4_1, (40, 64), "q"),
        "k": random_stored(TensorFormat.Q8_0, (40, 64), "k"),
    }
    apart = merged_graph()
    together = merge_linears(apart)
    assert [node.op for node in together.nodes].count("linear") == 1
    limits = Limits(max_tokens=9, max_context=9, num_blocks=4)
    first, second = (
        run_logits(compile_native(graph, tensors, weights=weights, limits=limits), range(9))  # type: ignore[arg-type]
        for graph in (apart, together)
    )
    np.testing.assert_array_equal(first, second)


def test_a_stored_matrix_that_is_cut_short_is_refused() -> None:
    whole = random_stored(TensorFormat.F32, (4, 8))
    with pytest.raises(ValueError, match="its shape needs 128"):
        _native.Weight(make_runtime(), [("f32", whole.data[:-4].copy(), 4, 8)], "f32", 0)


@pytest.mark.parametrize(
    ("option", "value"), [("weights", "int3"), ("kv_dtype", "f8"), ("threads", 0), ("isa", "sse9")]
)
def test_unknown_options_are_refused_by_name(option: str, value: object) -> None:
    graph = merged_graph()
    with pytest.raises(OptionError, match=str(value)):
        compile_native(graph, {}, limits=Limits(), **{option: value})  # type: ignore[arg-type]
