"""Packing: every stored format into every weight format, seen through the rows `embedding` reads back."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fastserve import _native
from fastserve.backends.native.executable import compile_native, make_runtime
from fastserve.backends.native.quantize_rows import FLOAT_BYTES, row_bytes
from fastserve.backends.native.weight_scheme import (
    SCHEMES,
    SPARSE_STORAGES,
    STORED_SCHEMES,
    Storage,
    WeightScheme,
    kept_scheme,
)
from fastserve.backends.native.weights import pack as pack_stacked
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.config import WeightFormat
from fastserve.errors import OptionError
from fastserve.graph.builder import GraphBuilder
from fastserve.graph.node import Graph
from fastserve.graph.passes import merge_linears
from fastserve.types import Batch, Float32Array, Limits
from parity import run_logits, store_f32
from stored_tensors import (
    CAN_BE_SPARSE,
    exact_values,
    random_grouped,
    random_stored,
    random_with_zeros,
    whole_blocks,
)

ISAS = _native.runnable_isas()


def pack(runtime: _native.Runtime, stored: StoredTensor, scheme: WeightScheme) -> _native.Weight:
    return pack_stacked(runtime, [stored], scheme)


def make_plan(runtime: _native.Runtime, rows: int, arena_bytes: int) -> _native.Plan:
    """A plan for one step of the tokens 0 .. rows."""
    return _native.Plan(
        runtime,
        arena_bytes,
        max_tokens=rows,
        max_outputs=rows,
        max_sequences=1,
        num_blocks=-(-rows // 32),
        max_context=rows,
        vocab_size=rows,
        num_token_types=0,
        needs_whole_sequences=False,
    )


def run_plan(plan: _native.Plan, out: _native.Matrix, rows: int) -> Float32Array:
    ids = np.arange(rows, dtype=np.int32)
    batch = Batch(
        token_ids=ids,
        positions=ids,
        sequence_starts=np.asarray([0, rows], np.int32),
        context_lengths=np.asarray([rows], np.int32),
        block_tables=np.arange(-(-rows // 32), dtype=np.int32)[None],
        output_rows=ids,
    )
    plan.run(batch, None)
    return plan.view(out, rows).copy()


def read_back(stored: StoredTensor, scheme: WeightScheme, isa: str) -> Float32Array:
    """The rows of a packed weight, as `embedding` dequantizes them."""
    rows, depth = stored.shape
    runtime = make_runtime(1, isa)
    plan = make_plan(runtime, rows, FLOAT_BYTES * rows * depth)
    out = _native.Matrix(0, depth, depth, _native.Rows.TOKENS)
    weight = pack(runtime, stored, scheme)
    plan.embedding(_native.IdSource.token_ids, weight, out)
    assert scheme.storage != "dense" or weight.num_bytes == scheme.num_bytes(rows, depth)
    return run_plan(plan, out, rows)


def multiply(x: Float32Array, weight: StoredTensor, scheme: WeightScheme, isa: str) -> Float32Array:
    """x @ weight.T by `quantize_rows` (where the scheme wants it) and `linear`."""
    rows, depth = x.shape
    width = weight.shape[0]
    runtime = make_runtime(1, isa)
    x_floats = row_bytes(depth, scheme.activation_group_size) // FLOAT_BYTES
    x_end = FLOAT_BYTES * rows * depth
    quantized_end = x_end + FLOAT_BYTES * rows * x_floats
    plan = make_plan(runtime, rows, quantized_end + FLOAT_BYTES * rows * width)
    tokens = _native.Rows.TOKENS
    seen = _native.Matrix(0, depth, depth, tokens)
    plan.embedding(_native.IdSource.token_ids, pack(runtime, store_f32({"x": x})["x"], SCHEMES["f32"]), seen)
    if scheme.is_integer:
        quantized = _native.Matrix(x_end, x_floats, depth, tokens, scheme.activation_group_size)
        plan.quantize_rows(seen, quantized)
        seen = quantized
    out = _native.Matrix(quantized_end, width, width, tokens)
    plan.linear(seen, pack(runtime, weight, scheme), None, out)
    return run_plan(plan, out, rows)


def to_bf16(x: Float32Array) -> Float32Array:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def round_weights(x: Float32Array, scheme: WeightScheme) -> Float32Array:
    """What a scheme makes of weights, group by group, from its definition."""
    if scheme.format == "f16":
        return x.astype(np.float16).astype(np.float32)
    if scheme.format == "bf16":
        return to_bf16(x)
    if scheme.format == "f32":
        return x
    step = scheme.group_size or x.shape[1]
    return np.hstack(
        [round_group(x[:, begin : begin + step], scheme) for begin in range(0, x.shape[1], step)]
    )


def round_group(x: Float32Array, scheme: WeightScheme) -> Float32Array:
    """Rows of one group, each rounded to whole multiples of a bfloat16 scale."""
    zero = np.zeros((len(x), 1), np.float32)
    low, high = np.minimum(x.min(axis=1, keepdims=True), 0), np.maximum(x.max(axis=1, keepdims=True), 0)
    if scheme.format == "int8":
        scale, least, most = np.maximum(-low, high) / np.float32(127), -128, 127
    elif scheme.offset == "none":
        scale, least, most = np.where(-low >= high, low, high) / np.float32(-8), -8, 7
    else:
        scale, least, most = high / np.float32(15) - low / np.float32(15), 0, 15
        zero = np.clip(np.rint(-low / np.where(scale == 0, 1, scale)), 0, 15)
    scale = to_bf16(scale.astype(np.float32))
    inverse = np.float32(1) / np.where(scale == 0, np.float32(1), scale)
    values = np.clip(np.rint(x * inverse) + zero, least, most)
    return ((values - zero) * scale).astype(np.float32)


BLOCKS = [stored for stored, scheme in STORED_SCHEMES.items() if scheme.scale_format == "f16"]
DEPTHS = (1, 15, 63, 64, 65, 172, 257, 576)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("stored_format", list(TensorFormat))
def test_every_stored_format_is_packed_exactly_as_float32(
    stored_format: TensorFormat, rows: int, isa: str
) -> None:
    stored = random_stored(stored_format, (rows, whole_blocks(stored_format, 96)))
    np.testing.assert_array_equal(read_back(stored, SCHEMES["f32"], isa), to_f32(stored))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("stored_format", list(TensorFormat))
def test_weights_as_stored_are_exactly_what_the_file_says(
    stored_format: TensorFormat, rows: int, isa: str
) -> None:
    stored = random_stored(stored_format, (rows, whole_blocks(stored_format, 160)))
    np.testing.assert_array_equal(read_back(stored, STORED_SCHEMES[stored_format], isa), to_f32(stored))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("weights", SCHEMES)
def test_weights_are_rounded_as_their_scheme_says(weights: WeightFormat, depth: int, isa: str) -> None:
    stored = random_stored(TensorFormat.F32, (70, depth))
    expected = round_weights(to_f32(stored), SCHEMES[weights])
    np.testing.assert_array_equal(read_back(stored, SCHEMES[weights], isa), expected)


@pytest.mark.parametrize("weights", ["int8", "int8:g32", "int4", "int4:asymmetric"])
def test_rows_of_zeros_and_the_largest_magnitudes_are_kept(weights: WeightFormat) -> None:
    values = np.zeros((3, 64), np.float32)
    values[1, 5], values[2] = -3e38, 1e-38
    packed = read_back(store_f32({"weight": values})["weight"], SCHEMES[weights], ISAS[0])
    assert not packed[0].any()
    np.testing.assert_allclose(packed, values, rtol=0.005, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("width", [1, 17, 64, 130])
def test_integer_linears_are_the_product_of_the_quantized_operands(width: int, depth: int, isa: str) -> None:
    rng = np.random.default_rng(11)
    x = rng.normal(size=(20, depth)).astype(np.float32) * 5
    weight = rng.normal(size=(width, depth)).astype(np.float32)
    for scheme in SCHEMES.values():
        if scheme.is_integer:
            assert_product(
                x, store_f32({"weight": weight})["weight"], round_weights(weight, scheme), scheme, isa
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stored_format", BLOCKS)
@pytest.mark.parametrize(("width", "depth"), [(1, 32), (64, 96), (130, 576)])
def test_linears_of_stored_blocks_are_the_product_of_what_the_file_says(
    width: int, depth: int, stored_format: TensorFormat, isa: str
) -> None:
    stored = random_stored(stored_format, (width, depth))
    x = np.random.default_rng(11).normal(size=(20, depth)).astype(np.float32) * 5
    assert_product(x, stored, to_f32(stored), STORED_SCHEMES[stored_format], isa)


WHOLE_NUMBERS = [
    (scale_format, bits, group_size, is_asymmetric)
    for scale_format in (TensorFormat.BF16, TensorFormat.F16)
    for group_size in (32, 64, 128, 256, 1000)
    for bits, is_asymmetric in ((8, False), (4, False), (4, True), (2, True))
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("scale_format", "bits", "group_size", "is_asymmetric"), WHOLE_NUMBERS)
def test_whole_numbers_are_kept_with_their_scales(
    scale_format: TensorFormat, bits: int, group_size: int, is_asymmetric: bool, isa: str
) -> None:
    stored = random_grouped(
        scale_format, (67, 334), bits=bits, group_size=group_size, is_asymmetric=is_asymmetric
    )
    scheme = kept_scheme(stored)
    assert scheme.format == ("int8" if bits == 8 else "int4")
    values = exact_values(stored)
    np.testing.assert_array_equal(read_back(stored, scheme, isa), values)
    x = np.random.default_rng(11).normal(size=(20, 334)).astype(np.float32) * 5
    assert_product(x, stored, values, scheme, isa)


@pytest.mark.parametrize(
    ("scale_format", "bits", "group_size", "is_asymmetric"),
    [
        (TensorFormat.F32, 8, 64, False),
        (TensorFormat.BF16, 8, 64, True),
        (TensorFormat.BF16, 4, 16, False),
        (TensorFormat.F16, 4, 96, True),
    ],
)
def test_whole_numbers_that_the_kernels_do_not_have_become_what_they_stand_for(
    scale_format: TensorFormat, bits: int, group_size: int, is_asymmetric: bool
) -> None:
    stored = random_grouped(
        scale_format, (67, 334), bits=bits, group_size=group_size, is_asymmetric=is_asymmetric
    )
    scheme = kept_scheme(stored)
    assert scheme.format == scale_format.value
    np.testing.assert_array_equal(read_back(stored, scheme, ISAS[0]), to_f32(stored))


def test_tensors_are_packed_the_same_some_panels_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = make_runtime(1, ISAS[0])
    stored = [
        random_grouped(TensorFormat.BF16, (rows, 200), bits=4, group_size=64, is_asymmetric=True)
        for rows in (130, 1, 66)
    ]
    for scheme in (kept_scheme(stored[0]), SCHEMES["int8"], SCHEMES["f32"], SCHEMES["int4:asymmetric"]):
        whole = pack_stacked(runtime, stored, scheme).panels
        with monkeypatch.context() as patch:
            patch.setattr("fastserve.backends.native.weights._FLOATS_AT_A_TIME", 1)
            np.testing.assert_array_equal(pack_stacked(runtime, stored, scheme).panels, whole)


def assert_product(
    x: Float32Array, stored: StoredTensor, weight: Float32Array, scheme: WeightScheme, isa: str
) -> None:
    expected = quantize_activations(x, scheme.activation_group_size) @ weight.astype(np.float64).T
    actual = multiply(x, stored, scheme, isa)
    # Of the sum of magnitudes, which bounds what rounding of the partial sums can do.
    scale = (np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * scale)


def quantize_activations(x: Float32Array, group_size: int) -> np.ndarray:
    out = np.empty(x.shape, np.float64)
    for begin in range(0, x.shape[1], group_size):
        group = x[:, begin : begin + group_size]
        largest = np.abs(group).max(axis=1, keepdims=True)
        inverse = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
        out[:, begin : begin + group_size] = np.rint(group * inverse) * (largest / np.float32(127))
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", [*SCHEMES.values(), *STORED_SCHEMES.values()], ids=str)
def test_a_product_does_not_depend_on_the_other_rows(scheme: WeightScheme, isa: str) -> None:
    """Register tiles of every height, and more than a block of rows: the same bits."""
    stored_format = next((f for f, s in STORED_SCHEMES.items() if s == scheme), TensorFormat.F32)
    stored = random_stored(stored_format, (70, 608))
    x = np.random.default_rng(3).normal(size=(205, 608)).astype(np.float32)
    whole = multiply(x, stored, scheme, isa)
    for rows in (1, 2, 3, 4, 5, 7, 13, 97):
        np.testing.assert_array_equal(multiply(x[:rows], stored, scheme, isa), whole[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("storage", SPARSE_STORAGES)
@pytest.mark.parametrize(
    ("width", "depth", "share_of_zeros"), [(1, 32, 0.0), (63, 96, 0.5), (130, 608, 0.97), (17, 288, 1.0)]
)
@pytest.mark.parametrize("scheme", CAN_BE_SPARSE, ids=str)
def test_sparse_weights_give_the_bits_of_dense_ones(
    scheme: WeightScheme, width: int, depth: int, share_of_zeros: float, storage: Storage, isa: str
) -> None:
    """One row, a register tile of every height, several, and more than a block of rows."""
    stored = random_with_zeros(scheme, (width, depth), share_of_zeros)
    sparse = replace(scheme, storage=storage)
    np.testing.assert_array_equal(read_back(stored, sparse, isa), read_back(stored, scheme, isa))
    x = np.random.default_rng(3).normal(size=(101, depth)).astype(np.float32)
    dense = multiply(x, stored, scheme, isa)
    for rows in (*range(1, 14), 101):
        np.testing.assert_array_equal(multiply(x[:rows], stored, sparse, isa), dense[:rows])


@pytest.mark.parametrize("storage", SPARSE_STORAGES)
@pytest.mark.parametrize("depth", [1, 15, 16, 17, 257])
@pytest.mark.parametrize("weights", ["int8", "int8:g32", "int4", "int4:g128"])
def test_sparse_weights_of_odd_depths_give_the_bits_of_dense_ones(
    weights: WeightFormat, depth: int, storage: Storage
) -> None:
    scheme = SCHEMES[weights]
    stored = random_with_zeros(scheme, (65, depth), 0.8)
    x = np.random.default_rng(3).normal(size=(9, depth)).astype(np.float32)
    expected = multiply(x, stored, scheme, ISAS[0])
    np.testing.assert_array_equal(multiply(x, stored, replace(scheme, storage=storage), ISAS[0]), expected)


@pytest.mark.parametrize(
    ("storage", "weights", "share_of_zeros", "bits"),
    [
        ("bitmask", "int8", 0.5, 5),
        ("bitmask", "int4", 0.5, 3.16),
        ("csr", "int8", 0.95, 0.95),
        ("csr", "int4", 0.95, 1.14),
    ],
)
def test_sparse_weights_take_the_memory_that_their_zeros_leave(
    storage: Storage, weights: WeightFormat, share_of_zeros: float, bits: float
) -> None:
    """Values and where they are: a bit a weight, or a byte a value and masks. int4 rounds some more to zeros,
    and has a scale for each group."""
    scheme = SCHEMES[weights]
    stored = random_with_zeros(scheme, (256, 1024), share_of_zeros)
    packed = pack(make_runtime(), stored, replace(scheme, storage=storage))
    assert packed.num_bytes == pytest.approx(256 * 1024 * bits / 8, rel=0.04)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(64, 64), (130, 172), (1, 1)])
def test_zeros_are_counted_without_padding(weights: WeightFormat, shape: tuple[int, int]) -> None:
    scheme = SCHEMES[weights]
    stored = random_with_zeros(scheme, shape, 0.7)
    runtime = make_runtime()
    packed = pack(runtime, stored, scheme)
    expected = np.mean(round_weights(to_f32(stored), scheme) == 0)
    assert packed.share_of_zeros(runtime) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("storage", SPARSE_STORAGES)
def test_sparse_panels_are_mapped_as_they_were_packed(storage: Storage) -> None:
    scheme = replace(SCHEMES["int8"], storage=storage)
    packed = pack(make_runtime(), random_with_zeros(scheme, (130, 512), 0.8), scheme)
    mapped = _native.Weight.from_panels(packed.panels, 130, 512, **asdict(scheme))
    assert (mapped.num_bytes, mapped.storage) == (packed.num_bytes, storage)


@pytest.mark.parametrize("storage", SPARSE_STORAGES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_panels_whose_masks_or_starts_were_damaged_are_refused(
    weights: WeightFormat, storage: Storage
) -> None:
    """Where a damaged byte is let through, kernels stay within the panels all the same."""
    scheme = replace(SCHEMES[weights], storage=storage)
    packed = pack(make_runtime(), random_with_zeros(scheme, (130, 128), 0.9), scheme)
    whole = aligned_copy(packed.panels)
    starts = whole[: 4 * 8].view(np.int64)
    first_panel = int(starts[0])
    with pytest.raises(ValueError, match=r"no whole|their shape needs"):
        _native.Weight.from_panels(aligned_copy(whole[:-64]), 130, 128, **asdict(scheme))
    # A bitmask's panel begins with its scales, of which no value is wrong.
    num_scales = 64 * (128 // scheme.group_size if scheme.group_size else 1) if storage == "bitmask" else 0
    places = [
        0,
        8,
        16,
        *(start + 2 * num_scales for start in (first_panel, first_panel + 1, *starts[1:3].tolist())),
    ]
    for place in places:  # starts, then a mask (bitmask) or a slice's start (CSR)
        for value in (0xFF, 0x7F):
            damaged = aligned_copy(whole)
            if damaged[place] == value:
                continue
            damaged[place : place + 8] = value
            with pytest.raises(ValueError, match="no whole"):
                _native.Weight.from_panels(damaged, 130, 128, **asdict(scheme))


def aligned_copy(panels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    memory = np.empty(len(panels) + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + len(panels)]
    copy[:] = panels
    return copy


def merged_graph() -> Graph:
    b = GraphBuilder()
    x = b.embedding("token_ids", "x", size=9, width=64)
    q, k = b.linear(x, "q", width=40), b.linear(x, "k", width=40)
    return b.finish(logits=b.gather_rows(b.add(q, k)))


@pytest.mark.parametrize("weights", SCHEMES)
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
        _native.Weight(make_runtime(), [("f32", whole.data[:-4].copy(), 4, 8)], "f32")


@pytest.mark.parametrize(
    ("option", "value"), [("weights", "int3"), ("kv_dtype", "f8"), ("threads", 0), ("isa", "sse9")]
)
def test_unknown_options_are_refused_by_name(option: str, value: object) -> None:
    graph = merged_graph()
    with pytest.raises(OptionError, match=str(value)):
        compile_native(graph, {}, limits=Limits(), **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int8", "group_size": 48, "activation_group_size": 48}, "groups of 48"),
        ({"format": "int8", "group_size": 32, "activation_group_size": 64}, "of activations 64"),
        ({"format": "int4", "group_size": 64}, "of activations 0"),
        ({"format": "int4"}, "need groups"),
        ({"format": "f16", "storage": "bitmask"}, "bitmask weights are integers"),
        (
            {"format": "int4", "group_size": 64, "activation_group_size": 64, "offset": "zero_point"}
            | {"storage": "bitmask"},
            "without offsets",
        ),
        ({"format": "int8", "offset": "zero_point"}, "no offsets"),
        ({"format": "int4", "activation_group_size": 64, "offset": "minimum"}, "minimums are those"),
        ({"format": "int4", "activation_group_size": 64, "scale_format": "f16"}, "no blocks of the kind"),
        (
            {"format": "int8", "group_size": 32, "activation_group_size": 32, "scale_format": "f16"},
            "no blocks of the kind",
        ),
    ],
)
def test_schemes_that_the_kernels_do_not_have_are_refused(options: dict[str, object], message: str) -> None:
    stored = random_stored(TensorFormat.F32, (4, 64))
    with pytest.raises(ValueError, match=message):
        pack(make_runtime(), stored, WeightScheme(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", ["f32", "f16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["x", "weight"])
def test_what_is_not_a_number_is_never_quantized_away(
    place: str, broken: float, weights: str, isa: str
) -> None:
    rng = np.random.default_rng(3)
    parameters = {
        "x": rng.normal(size=(4, 70)).astype(np.float32),
        "weight": rng.normal(size=(5, 70)).astype(np.float32),
    }
    parameters[place][2, 33] = broken
    b = GraphBuilder()
    graph = b.finish(
        logits=b.gather_rows(b.linear(b.embedding("token_ids", "x", size=4, width=70), "weight", width=5))
    )
    limits = Limits(max_tokens=4, max_context=32, num_blocks=4)
    logits = run_logits(
        compile_native(graph, store_f32(parameters), weights=weights, limits=limits, isa=isa),  # type: ignore[arg-type]
        range(4),
    )
    hit = logits[2] if place == "x" else logits[:, 2]
    assert not np.isfinite(hit).any()
    rest = np.delete(logits, 2, axis=0 if place == "x" else 1)
    assert np.isfinite(rest).all()
