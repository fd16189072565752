from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastserve.checkpoint import StoredTensor, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.errors import CheckpointError, FastServeError, UnsupportedError

OpenParts = Callable[..., Mapping[str, StoredTensor]]


def config_of(form: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(weights)}},
        "quantization_status": "compressed",
    }


def compress(
    form: str, arguments: Mapping[str, Any], rows: int, depth: int, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts that the library makes of random weights, and what it makes of them again."""
    random = torch.Generator().manual_seed(3)
    weights = QuantizationArgs(**arguments)
    activations = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=None if form == "pack-quantized" else activations,
    )
    groups = {"tensor": None, "channel": 1}.get(arguments["strategy"], depth // (weights.group_size or depth))
    shape = (1,) if groups is None else (rows, groups)
    limit = 2 ** (weights.num_bits - 1)
    state = {
        "weight": torch.randn((rows, depth), generator=random).to(dtype),
        "weight_scale": (torch.rand(shape, generator=random) * 0.03 + 0.01).to(dtype) * 16 / limit * 8,
        "weight_zero_point": torch.randint(-limit, limit, shape, generator=random).to(torch.int8),
    }
    if weights.symmetric:
        del state["weight_zero_point"]
    compressor = BaseCompressor.get_value_from_registry(form)
    parts = compressor.compress(state, scheme)
    return parts, compressor.decompress(parts, scheme)["weight"]


INT8 = {"num_bits": 8, "type": "int"}
CASES = [
    ("int-quantized", {**INT8, "strategy": "channel", "symmetric": True}),
    ("int-quantized", {**INT8, "strategy": "tensor", "symmetric": True}),
    ("int-quantized", {**INT8, "strategy": "channel", "symmetric": False}),
    *(
        ("pack-quantized", {"num_bits": bits, "type": "int", "symmetric": symmetric, **groups})
        for bits in (4, 8)
        for symmetric in (True, False)
        for groups in ({"strategy": "channel"}, {"strategy": "group", "group_size": 32})
    ),
    (
        "pack-quantized",
        {"num_bits": 2, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "depth"), [(17, 64), (67, 192)])
@pytest.mark.parametrize(("form", "arguments"), CASES, ids=str)
def test_weights_are_those_that_the_library_decompresses(
    open_parts: OpenParts, form: str, arguments: dict[str, Any], rows: int, depth: int, dtype: torch.dtype
) -> None:
    parts, expected = compress(form, arguments, rows, depth, dtype)
    named = {f"model.q_proj.{name}": part for name, part in parts.items()}
    tensors = open_parts({**named, "norm.weight": torch.ones(3)}, config_of(form, arguments))
    assert set(tensors) == {"model.q_proj.weight", "norm.weight"}
    weight = tensors["model.q_proj.weight"]
    assert isinstance(weight, GroupedTensor)
    assert weight.shape == (rows, depth)
    assert weight.bits == arguments["num_bits"]
    assert torch.equal(torch.from_numpy(to_f32(weight)), expected.float())
    assert np.array_equal(to_f32(weight.rows(rows // 2, rows)), expected.float().numpy()[rows // 2 :])


def test_zero_points_that_are_all_zero_are_as_none(open_parts: OpenParts) -> None:
    parts = {
        "a.weight": torch.tensor([[1, -2]], dtype=torch.int8),
        "a.weight_scale": torch.ones((1, 1)),
        "a.weight_zero_point": torch.zeros((1, 1), dtype=torch.int8),
    }
    weight = open_parts(parts, config_of("int-quantized", INT8))["a.weight"]
    assert isinstance(weight, GroupedTensor)
    assert not weight.has_zeros()


def test_columns_of_any_group_have_its_scale(open_parts: OpenParts) -> None:
    codes = torch.randint(-128, 128, (4, 8), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scales = torch.tensor([[1.0, 2.0]]).repeat(4, 1)
    groups = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.int32)
    parts = {"a.weight": codes, "a.weight_scale": scales, "a.weight_g_idx": groups}
    weight = open_parts(parts, config_of("int-quantized", INT8))["a.weight"]
    assert np.array_equal(to_f32(weight), (codes.float() * (groups + 1)).numpy())


def bitmask_parts(dense: torch.Tensor) -> dict[str, torch.Tensor]:
    """As sparse-bitmask stores a matrix (compressed-tensors 0.11, sparse_bitmask.py)."""
    mask = dense != 0
    counts = mask.sum(dim=1)
    packed = np.packbits(mask.numpy(), axis=1, bitorder="little")
    return {
        "shape": torch.tensor(dense.shape),
        "compressed": dense[mask],
        "bitmask": torch.from_numpy(packed),
        "row_offsets": torch.cumsum(counts, 0) - counts,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("prefix", ["a.weight", "a"])
def test_sparse_weights_are_made_dense(open_parts: OpenParts, prefix: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(2)
    dense = torch.randn((37, 53), generator=random).to(dtype)
    dense[torch.rand(dense.shape, generator=random) < 0.6] = 0
    dense[3] = 0
    parts = {f"{prefix}.{name}": part for name, part in bitmask_parts(dense).items()}
    quantization = {"sparsity_config": {"format": "sparse-bitmask"}}
    weight = open_parts(parts, {**config_of("dense", INT8), **quantization})["a.weight"]
    assert np.array_equal(to_f32(weight), dense.float().numpy())
    assert np.array_equal(to_f32(weight.rows(5, 9)), dense.float().numpy()[5:9])


def test_weights_may_be_sparse_and_quantized(open_parts: OpenParts) -> None:
    """sparse-24-bitmask: two of four neighbours, kept as a matrix of half the columns."""
    random = torch.Generator().manual_seed(4)
    dense = torch.randint(-128, 128, (6, 16), generator=random).to(torch.int8).view(-1, 4)
    kept = torch.rand(dense.shape, generator=random).argsort(dim=1) < 2
    dense = torch.where(kept & (dense == 0), torch.tensor(1, dtype=torch.int8), dense) * kept
    values, dense = dense[kept].reshape(6, 8), dense.reshape(6, 16)
    parts = {
        "a.compressed": values,
        "a.bitmask": torch.from_numpy(np.packbits(kept.reshape(6, 16).numpy(), axis=1, bitorder="little")),
        "a.shape": torch.tensor([[6], [16]]),
        "a.weight_scale": torch.full((6, 1), 0.5),
    }
    quantization = {**config_of("int-quantized", INT8), "sparsity_config": {"format": "sparse-24-bitmask"}}
    assert np.array_equal(to_f32(open_parts(parts, quantization)["a.weight"]), 0.5 * dense.float().numpy())


def test_scales_of_activations_are_left_out_and_told(
    open_parts: OpenParts, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {
        "a.weight": torch.ones((2, 2), dtype=torch.int8),
        "a.weight_scale": torch.ones((2, 1)),
        "a.input_scale": torch.ones(1),
        "a.input_zero_point": torch.zeros(1, dtype=torch.int8),
    }
    caplog.set_level("INFO")
    assert set(open_parts(parts, config_of("int-quantized", INT8))) == {"a.weight"}
    assert "2 stored scales of activations are not used" in caplog.text


PACKED = {
    "a.weight_packed": torch.zeros((4, 2), dtype=torch.int32),
    "a.weight_scale": torch.ones((4, 2)),
    "a.weight_shape": torch.tensor([4, 16]),
}
SPARSE = {f"a.{name}": part for name, part in bitmask_parts(torch.eye(8)).items()}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({**PACKED, "a.weight_shape": torch.tensor([4, 2**40])}, "weight_packed has 2 words a row"),
        ({**PACKED, "a.weight_shape": torch.tensor([2**40, 16])}, "weight_packed is .4, 2. and weight_shape"),
        ({**PACKED, "a.weight_shape": torch.tensor([4, -16])}, "weight_shape .4, -16."),
        ({**PACKED, "a.weight_shape": torch.tensor([4.0, 16.0])}, "weight_shape is of floats"),
        ({**PACKED, "a.weight_scale": torch.ones((3, 2))}, r"weight_scale is \[3, 2\]"),
        ({**PACKED, "a.weight_scale": torch.ones((4, 7))}, "16 columns do not part into 7 groups"),
        ({**PACKED, "a.weight_scale": torch.ones((4, 2), dtype=torch.int32)}, "weight_scale is I32, floats"),
        ({**PACKED, "a.weight_zero_point": torch.zeros((3, 2), dtype=torch.int32)}, "weight_zero_point is"),
        ({**PACKED, "a.weight_g_idx": torch.full((16,), 2, dtype=torch.int32)}, r"g_idx is \[16\] up to 2"),
        ({**PACKED, "a.weight_g_idx": torch.zeros(15, dtype=torch.int32)}, r"weight_g_idx is \[15\]"),
        ({name: PACKED[name] for name in ("a.weight_packed", "a.weight_shape")}, "weight_scale is missing"),
        ({name: PACKED[name] for name in ("a.weight_packed", "a.weight_scale")}, "weight_shape is missing"),
        ({"a.weight_scale": torch.ones((4, 2))}, "weight is missing"),
        ({**SPARSE, "a.shape": torch.tensor([8, 2**40])}, "shape is .8, 1099511627776. and bitmask .8, 1."),
        ({**SPARSE, "a.shape": torch.tensor([8])}, "shape is .8. and bitmask"),
        ({**SPARSE, "a.compressed": torch.ones(9)}, "has 9 values, 8 bits are set in its bitmask"),
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_contradict_each_other_are_named(
    open_parts: OpenParts, parts: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        to_f32(open_parts(parts, config_of("pack-quantized", {"num_bits": 4}))["a.weight"])


@pytest.mark.parametrize(
    ("quantization", "error", "message"),
    [
        ({"quant_method": "bitsandbytes"}, UnsupportedError, "quant_method 'bitsandbytes', supported are"),
        ({"format": "nvfp4-pack-quantized", "config_groups": {}}, UnsupportedError, "nvfp4-pack-quantized"),
        ({"config_groups": {"g": {"format": "float-quantized"}}}, UnsupportedError, "float-quantized"),
        ({"config_groups": {}, "sparsity_config": {"format": "csr"}}, UnsupportedError, "'csr'"),
        ({"config_groups": {}, "transform_config": {"a": 1}}, UnsupportedError, "transform_config"),
        ({"config_groups": [], "quant_method": "compressed-tensors"}, UnsupportedError, "element type I8"),
        ({"config_groups": [1]}, CheckpointError, "config_groups"),
        (7, CheckpointError, "quantization_config of config.json is no object"),
    ],
)  # fmt: skip
def test_a_config_that_we_cannot_follow_is_refused_by_name(
    open_parts: OpenParts, quantization: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_parts({"a": torch.ones(2, dtype=torch.int8)}, quantization)


def test_weights_that_are_not_compressed_are_refused(open_parts: OpenParts) -> None:
    parts = {"a.weight": torch.ones((2, 2)), "a.weight_scale": torch.ones((2, 1))}
    with pytest.raises(UnsupportedError, match="floats beside scales"):
        open_parts(parts, config_of("int-quantized", INT8))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=4)
    | st.sampled_from(["pack-quantized", "awq"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["format", "config_groups", "weights", "num_bits", "sparsity_config", "quant_method"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(quantization=JSON, method=st.sampled_from(["compressed-tensors", "gptq", "awq", None]))
@settings(deadline=1000, max_examples=80)
def test_any_config_never_raises_anything_but_our_errors(
    quantization: Any, method: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "odd_config"
    folder.mkdir(exist_ok=True)
    save_file({**PACKED, **SPARSE}, folder / "model.safetensors")
    if isinstance(quantization, dict) and method is not None:
        quantization = {"quant_method": method, **quantization}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with suppress(FastServeError):
        open_checkpoint(folder)


@given(data=st.data())
@settings(deadline=1000, max_examples=200)
def test_parts_of_any_shape_never_raise_anything_but_our_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    parts = dict(data.draw(st.sampled_from([PACKED, SPARSE, {**PACKED, **SPARSE}])))
    names = [*parts, "a.weight", "a.weight_g_idx", "a.weight_zero_point", "a.weight_scale"]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
        dtype = data.draw(st.sampled_from([torch.int8, torch.int32, torch.int64, torch.float16, torch.uint8]))
        parts[name] = torch.full(shape, data.draw(st.integers(-3, 2**7 - 1)) % 128).to(dtype)
    save_file({name: part.contiguous() for name, part in parts.items()}, folder / "model.safetensors")
    config = {
        "quantization_config": config_of(
            "pack-quantized", {"num_bits": data.draw(st.sampled_from([4, 8, 1]))}
        )
    }
    (folder / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    try:
        for tensor in open_checkpoint(folder).tensors.values():
            assert to_f32(tensor).shape == tensor.shape
    except FastServeError:
        pass
    assert time.process_time() - start < 1
