"""Against the dequantization of gptqmodel (torch kernel) and of autoawq, written again from their layouts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastserve.checkpoint import StoredTensor, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.errors import CheckpointError, FastServeError, UnsupportedError

OpenParts = Callable[..., Mapping[str, StoredTensor]]

ROWS, DEPTH, GROUPS = 48, 128, 4


def words(shape: tuple[int, int], seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=random).to(torch.int32)


def random_scales(dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand((GROUPS, ROWS), generator=torch.Generator().manual_seed(3)) * 0.1 + 0.01).to(dtype)


def gptq_parts(bits: int, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    return {
        "qweight": words((DEPTH * bits // 32, ROWS), 1),
        "qzeros": words((GROUPS, ROWS * bits // 32), 2),
        "scales": random_scales(dtype),
    }


def dequantize_gptq(parts: dict[str, torch.Tensor], bits: int, version: str) -> torch.Tensor:
    """[outputs, inputs]"""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = 2**bits - 1
    weight = (parts["qweight"].unsqueeze(1) >> shifts[None, :, None] & mask).reshape(DEPTH, ROWS)
    zeros = (parts["qzeros"].unsqueeze(2) >> shifts[None, None, :] & mask).reshape(GROUPS, ROWS)
    if version == "gptq":
        zeros = zeros + 1 & mask
    groups = parts.get("g_idx", torch.arange(DEPTH) // (DEPTH // GROUPS)).long()
    return (parts["scales"][groups] * (weight - zeros[groups])).T


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_weights_are_those_of_its_library(
    open_parts: OpenParts, bits: int, version: str, act_order: bool, dtype: torch.dtype
) -> None:
    parts = gptq_parts(bits, dtype)
    if act_order:
        order = torch.randperm(DEPTH, generator=torch.Generator().manual_seed(5))
        parts["g_idx"] = (order // (DEPTH // GROUPS)).to(torch.int32)
    config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    tensors = open_parts({f"m.{name}": part for name, part in parts.items()}, config)
    assert list(tensors) == ["m.weight"]
    weight = tensors["m.weight"]
    assert isinstance(weight, GroupedTensor)
    assert (weight.shape, weight.bits) == ((ROWS, DEPTH), bits)
    assert (weight.group_of_column is not None) == act_order
    expected = dequantize_gptq(parts, bits, version).float().numpy()
    assert np.array_equal(to_f32(weight), expected)
    assert np.array_equal(to_f32(weight.rows(9, 31)), expected[9:31])


def test_symmetric_gptq_has_no_zero_points(open_parts: OpenParts) -> None:
    parts = {**gptq_parts(4), "g_idx": (torch.arange(DEPTH) // (DEPTH // GROUPS)).to(torch.int32)}
    parts["qzeros"] = torch.full_like(parts["qzeros"], 0x77777777)
    weight = open_parts({f"m.{k}": v for k, v in parts.items()}, {"quant_method": "gptq"})["m.weight"]
    assert isinstance(weight, GroupedTensor)
    assert not weight.has_zeros()
    assert weight.group_of_column is None
    assert weight.group_size == DEPTH // GROUPS


def pack_awq(numbers: np.ndarray) -> torch.Tensor:
    """Eight neighbours of a row in a word, as awq/modules/linear/gemm.py packs them."""
    packed = np.zeros((len(numbers), numbers.shape[1] // 8), np.uint32)
    for column in range(packed.shape[1]):
        for place, neighbour in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            packed[:, column] |= numbers[:, column * 8 + neighbour].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(packed.view(np.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_awq_weights_are_those_of_its_library(open_parts: OpenParts, dtype: torch.dtype) -> None:
    random = np.random.default_rng(1)
    weight, zeros = random.integers(0, 16, (DEPTH, ROWS)), random.integers(0, 16, (GROUPS, ROWS))
    scales = random_scales(dtype)
    parts = {"m.qweight": pack_awq(weight), "m.qzeros": pack_awq(zeros), "m.scales": scales}
    tensors = open_parts(parts, {"quant_method": "awq", "bits": 4, "version": "GEMM"})
    assert list(tensors) == ["m.weight"]
    repeated = [array.repeat_interleave(DEPTH // GROUPS, 0) for array in (torch.from_numpy(zeros), scales)]
    expected = ((torch.from_numpy(weight) - repeated[0]) * repeated[1]).T.float().numpy()
    assert np.array_equal(to_f32(tensors["m.weight"]), expected)
    assert np.array_equal(to_f32(tensors["m.weight"].rows(9, 31)), expected[9:31])


def awq_parts() -> dict[str, torch.Tensor]:
    return {"qweight": words((DEPTH, ROWS // 8), 1), "qzeros": words((GROUPS, ROWS // 8), 2),
            "scales": random_scales(torch.float16)}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin', supported"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' of AWQ"),
        ({"quant_method": "awq", "bits": 3}, "bits 3; supported are gemm, 4"),
    ],
)  # fmt: skip
def test_other_versions_are_refused_by_name(
    open_parts: OpenParts, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_parts({f"m.{name}": part for name, part in awq_parts().items()}, config)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("gptq", {"qzeros": words((GROUPS, ROWS * 4 // 32 + 1), 1)}, "shapes contradict each other"),
        ("gptq", {"qzeros": words((GROUPS + 1, ROWS * 4 // 32), 1)}, "shapes contradict each other"),
        ("gptq", {"qweight": words((DEPTH * 4 // 32, ROWS + 1), 1)}, "shapes contradict each other"),
        ("gptq", {"qweight": torch.zeros(4, dtype=torch.int32)}, "shapes contradict each other"),
        ("gptq", {"g_idx": torch.full((DEPTH,), GROUPS, dtype=torch.int32)}, "g_idx is .128. up to 4, for"),
        ("gptq", {"scales": None}, "scales is missing, floats were expected"),
        ("gptq", {"qzeros": None}, "qzeros is missing, I32 was expected"),
        ("awq", {"qzeros": words((GROUPS + 1, ROWS // 8), 1)}, "shapes contradict each other"),
        ("awq", {"scales": torch.ones((GROUPS, ROWS), dtype=torch.int32)}, "scales is I32, floats"),
    ],
)  # fmt: skip
def test_parts_that_contradict_each_other_are_named(
    open_parts: OpenParts, method: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    parts = {**(gptq_parts(4) if method == "gptq" else awq_parts()), **changes}
    named = {f"m.{name}": part for name, part in parts.items() if part is not None}
    with pytest.raises(CheckpointError, match=message):
        open_parts(named, {"quant_method": method})


def test_three_bits_are_refused_by_name(open_parts: OpenParts) -> None:
    parts = {"m.qweight": words((12, 64), 1), "m.qzeros": words((4, 6), 2), "m.scales": torch.ones((4, 64))}
    with pytest.raises(UnsupportedError, match="weights of 3 bits, supported are 2, 4, 8"):
        open_parts(parts, {"quant_method": "gptq"})


@given(data=st.data())
@settings(deadline=1000, max_examples=100)
def test_parts_of_any_shape_never_raise_anything_but_our_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged_parts"
    folder.mkdir(exist_ok=True)
    method = data.draw(st.sampled_from(["gptq", "awq"]))
    parts = gptq_parts(4) if method == "gptq" else awq_parts()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(["qweight", "qzeros", "scales", "g_idx"]))
        shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
        dtype = data.draw(st.sampled_from([torch.int32, torch.int64, torch.float16]))
        parts[name] = torch.full(shape, data.draw(st.integers(-3, 100))).to(dtype)
    save_file({f"m.{name}": part for name, part in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    start = time.process_time()
    try:
        for tensor in open_checkpoint(folder).tensors.values():
            assert to_f32(tensor).shape == tensor.shape
    except FastServeError:
        pass
    assert time.process_time() - start < 1
