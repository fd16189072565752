from __future__ import annotations

import json
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from fastserve.checkpoint import open_checkpoint
from fastserve.checkpoint.bit_stream import pack_pieces, pack_stream, stream_bytes, unpack_stream
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.packed_weights import PACKED_FILE, packed_config
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.errors import CheckpointError, FastServeError, UnsupportedError
from packed_model import grouped_of, random_grouped, write_sidecar


def open_weight(folder: Path, name: str = "a.weight") -> GroupedTensor:
    weight = open_checkpoint(folder).tensors[name]
    assert isinstance(weight, GroupedTensor)
    return weight


def assert_same(read: GroupedTensor, written: GroupedTensor) -> None:
    assert (read.shape, read.bits, read.group_size, read.format) == (
        written.shape,
        written.bits,
        written.group_size,
        written.format,
    )
    found, expected = read.groups(0, read.shape[0]), written.groups(0, read.shape[0])
    assert np.array_equal(found.codes, expected.codes)
    assert np.array_equal(found.scales, expected.scales)
    if expected.zeros is None:
        assert found.zeros is None
    else:
        assert found.zeros is not None
        assert np.array_equal(found.zeros, expected.zeros)
    assert read.has_zeros() == written.has_zeros()
    assert np.array_equal(read.column_groups(), written.column_groups())


# A second reader, bit by bit, of what the header of packed_weights.py promises.


def stream_of(data: np.ndarray, bits: int) -> list[int]:
    ones = [int(byte) >> place & 1 for byte in data for place in range(8)]
    return [
        sum(bit << place for place, bit in enumerate(ones[at : at + bits]))
        for at in range(0, len(ones), bits)
    ]


def read_plainly(folder: Path, name: str) -> np.ndarray:
    """The dequantized weight."""
    with safe_open(folder / PACKED_FILE, framework="pt") as file:
        about = json.loads(file.metadata()["weights"])[name]
        names = [key for key in file.keys() if key.startswith(name)]  # noqa: SIM118
        parts = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in names}
    (rows, depth), bits, size = about["shape"], about["bits"], about["group_size"]
    scales = parts["scales"].float().numpy()
    middle = 2 ** (bits - 1)
    zeros = np.full(scales.shape, middle)
    if "zeros" in parts:
        zeros = np.array(stream_of(parts["zeros"].numpy(), bits)[: scales.size]).reshape(scales.shape)
    codes = iter(stream_of(parts["codes"].numpy(), bits))
    groups = parts["groups"].tolist() if "groups" in parts else [column // size for column in range(depth)]
    found = np.array([[zeros[row, groups[column]] for column in range(depth)] for row in range(rows)])
    if about["storage"] == "dense":
        found = np.array([[next(codes) for _ in range(depth)] for _ in range(rows)])
    elif about["storage"] == "bitmask":
        mask = iter(stream_of(parts["mask"].numpy(), 1))
        for row in range(rows):
            for column in range(depth):
                if next(mask):
                    found[row, column] = next(codes)
    else:
        gaps = iter(stream_of(parts["gaps"].numpy(), about["gap_bits"]))
        counts = iter(parts["counts"].tolist())
        is_csr = about["storage"] == "csr"
        lines = (
            [(row, None) for row in range(rows)]
            if is_csr
            else [(strip, column) for strip in range(0, rows, 512) for column in range(depth)]
        )
        for first, column in lines:
            at = -1
            for _ in range(next(counts)):
                at += next(gaps) + 1
                found[(first, at) if column is None else (first + at, column)] = next(codes)
    of_column = np.array(groups)
    return ((found - zeros[:, of_column]) * scales[:, of_column]).astype(np.float32)


@given(
    rows=st.integers(1, 40),
    depth=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    group_size=st.sampled_from([1, 16, 32, 64, 1000]),
    share_of_zeros=st.sampled_from([0.0, 0.3, 0.6, 0.9, 0.97, 1.0]),
    empty_columns=st.sampled_from([0.0, 0.9]),
    is_asymmetric=st.booleans(),
    scale_format=st.sampled_from([TensorFormat.BF16, TensorFormat.F16, TensorFormat.F32]),
    seed=st.integers(0, 5),
)
@settings(deadline=2000, max_examples=120)
def test_what_is_written_is_read_by_two_readers(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    depth: int,
    bits: int,
    group_size: int,
    share_of_zeros: float,
    empty_columns: float,
    is_asymmetric: bool,
    scale_format: TensorFormat,
    seed: int,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "sidecar"
    weight = random_grouped(
        rows,
        depth,
        bits=bits,
        group_size=min(group_size, depth),
        share_of_zeros=share_of_zeros,
        empty_columns=empty_columns,
        is_asymmetric=is_asymmetric,
        scale_format=scale_format,
        seed=seed,
    )
    sizes = write_sidecar(folder, {"a.weight": weight})
    read = open_weight(folder)
    assert_same(read, weight)
    begin, end = rows // 3, rows // 3 + (rows - rows // 3 + 1) // 2
    assert np.array_equal(read.groups(begin, end).codes, weight.groups(begin, end).codes)
    exact = grouped_of(
        *(weight.groups(0, rows)[i] for i in (0, 2, 1)),
        bits=bits,
        group_size=weight.group_size,
        scale_format=TensorFormat.F32,
    )
    assert np.array_equal(read_plainly(folder, "a.weight"), to_f32(exact))
    with safe_open(folder / PACKED_FILE, framework="np") as file:
        assert sizes.weights[0].file_bytes == sum(
            np.prod(file.get_slice(key).get_shape()) * (2 if file.get_slice(key).get_dtype() == "U16" else 1)
            for key in file.keys()  # noqa: SIM118
            if not key.endswith(".scales")
        ) + weight.num_groups * rows * (4 if scale_format is TensorFormat.F32 else 2)


@pytest.mark.parametrize(
    ("share_of_zeros", "empty_columns", "bits", "expected"),
    [
        (0.0, 0.0, 8, "dense"),
        (0.1, 0.0, 8, "dense"),
        (0.5, 0.0, 8, "bitmask"),
        (0.5, 0.0, 4, "bitmask"),
        (0.2, 0.0, 4, "dense"),
        (0.97, 0.0, 4, "csr"),
        (0.0, 0.97, 8, "csc"),
    ],
)
def test_the_smallest_storage_is_chosen(
    tmp_path: Path, share_of_zeros: float, empty_columns: float, bits: int, expected: str
) -> None:
    weight = random_grouped(
        1100, 600, bits=bits, group_size=600, share_of_zeros=share_of_zeros, empty_columns=empty_columns
    )
    size = write_sidecar(tmp_path, {"a.weight": weight}).weights[0]
    assert size.storage == expected
    kept = 1100 * 600 - size.num_zeros
    bitmask_bytes = kept * bits // 8 + 1100 * 600 // 8
    dense_bytes = 1100 * 600 * bits // 8
    assert size.file_bytes <= min(bitmask_bytes, dense_bytes) + 1100 * 4 + 64
    assert size.expanded_bytes == dense_bytes + 1100 * 2
    assert_same(open_weight(tmp_path), weight)
    pieces = [open_weight(tmp_path).groups(begin, begin + 100).codes for begin in range(0, 1100, 100)]
    assert np.array_equal(np.concatenate(pieces), weight.groups(0, 1100).codes)


def test_three_and_two_bits_take_three_and_two_bits_on_disk_and_four_expanded(tmp_path: Path) -> None:
    for bits in (2, 3):
        weight = random_grouped(256, 512, bits=bits, group_size=64)
        sizes = write_sidecar(tmp_path, {"a.weight": weight})
        assert sizes.weights[0].file_bytes == 256 * 512 * bits // 8 + 256 * 8 * 2
        assert sizes.expanded_bytes == 256 * 512 // 2 + 256 * 8 * 2
        assert sizes.file_bytes == (tmp_path / PACKED_FILE).stat().st_size


def test_groups_of_any_columns_are_kept(tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(np.arange(64) // 16).astype(np.int32)
    rng = np.random.default_rng(2)
    weight = grouped_of(
        rng.integers(-8, 8, (5, 64)).astype(np.int8),
        rng.uniform(1, 2, (5, 4)).astype(np.float32),
        rng.integers(-8, 8, (5, 4)).astype(np.int8),
        bits=4,
        group_size=16,
        scale_format=TensorFormat.F32,
        group_of_column=order,
    )
    write_sidecar(tmp_path, {"a.weight": weight})
    assert_same(open_weight(tmp_path), weight)
    assert np.array_equal(read_plainly(tmp_path, "a.weight"), to_f32(weight))


def test_floats_stay_in_a_file_of_their_own(tmp_path: Path) -> None:
    write_sidecar(tmp_path, {"a.weight": random_grouped(4, 8, bits=4, group_size=8)})
    save_file({"norm.weight": np.ones(8, np.float32)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a.weight", "norm.weight"}
    assert tmp_path / PACKED_FILE in checkpoint.files


def test_a_weight_of_one_bit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"a\.weight has 1 bits, the sidecar holds 2 to 8"):
        write_sidecar(tmp_path, {"a.weight": random_grouped(4, 8, bits=1, group_size=8)})


@given(st.lists(st.integers(0, 255), max_size=60), st.integers(1, 8), st.data())
def test_streams_are_read_from_any_number_on(numbers: list[int], bits: int, data: st.DataObject) -> None:
    values = np.array(numbers, np.uint8) & np.uint8(2**bits - 1)
    packed = pack_stream(values, bits)
    assert len(packed) == stream_bytes(len(values), bits)
    first = data.draw(st.integers(0, len(values)))
    count = data.draw(st.integers(0, len(values) - first))
    assert unpack_stream(packed, first, count, bits).tolist() == values[first : first + count].tolist()
    cut = data.draw(st.integers(0, len(values)))
    assert np.array_equal(np.concatenate(list(pack_pieces([values[:cut], values[cut:]], bits))), packed)
    assert stream_of(packed, bits)[: len(values)] == values.tolist()


# Damage.


def save(folder: Path, parts: dict[str, np.ndarray], described: Any, version: Any = 1) -> None:
    folder.mkdir(exist_ok=True)
    text = described if isinstance(described, str) else json.dumps(described)
    save_file(parts, folder / PACKED_FILE, metadata={"weights": text})
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {**packed_config(), "version": version}})
    )


def parts_of(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with safe_open(folder / PACKED_FILE, framework="np") as file:
        parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return parts, json.loads(file.metadata()["weights"])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Parts and description of a weight in each storage."""
    folder, found = tmp_path_factory.mktemp("stored"), {}
    for zeros, empty, storage in [(0.0, 0, "dense"), (0.5, 0, "bitmask"), (0.96, 0, "csr"), (0, 0.96, "csc")]:
        weight = random_grouped(
            600,
            600,
            bits=4,
            group_size=100,
            share_of_zeros=zeros,
            empty_columns=empty,
            is_asymmetric=True,
            scale_format=TensorFormat.F32,
        )
        write_sidecar(folder, {"a.weight": weight})
        found[storage] = parts_of(folder)
        assert found[storage][1]["a.weight"]["storage"] == storage
    return found


def changed(entry: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"a.weight": {**entry["a.weight"], **fields}}


@pytest.mark.parametrize(
    ("storage", "part", "change", "message"),
    [
        ("dense", "codes", lambda x: x[:-1], "codes take 179999 bytes, not what 600 x 600 elements do"),
        ("dense", "scales", lambda x: x[:-1], r"scales are \[599, 6\], \[600, 6\] were expected"),
        ("dense", "scales", None, "scales is missing"),
        ("dense", "codes", None, "codes is missing"),
        ("dense", "zeros", lambda x: x[:-1], "zeros take 1799 bytes"),
        ("dense", "codes", lambda x: x.astype(np.int8), "codes is I8, U8 was expected"),
        ("bitmask", "mask", lambda x: x[:-1], "mask takes 44999 bytes"),
        ("bitmask", "mask", lambda x: x | 1, r"\d+ codes are counted, \d+ bits are set in the mask"),
        ("bitmask", "codes", lambda x: x[:-4], "entries are counted, which"),
        ("bitmask", "counts", lambda x: x[:-1], "599 lines are counted, 600 were expected"),
        ("csr", "counts", lambda x: x + x, "entries are counted, which"),
        ("csr", "gaps", lambda x: x | 255, "an entry is at .* of a line of 600 elements"),
        ("csr", "gaps", lambda x: x.reshape(1, -1), "its parts are no streams"),
        ("csc", "gaps", lambda x: x | 255, "an entry is at .* of a line of"),
        ("csc", "counts", lambda x: x[:-1], "1199 lines are counted, 1200 were expected"),
    ],
)
def test_parts_that_contradict_each_other_are_named(
    tmp_path: Path, stored: dict[str, Any], storage: str, part: str, change: Any, message: str
) -> None:
    parts, described = stored[storage]
    name = f"a.weight.{part}"
    damaged = {key: value for key, value in parts.items() if key != name}
    if change is not None:
        damaged[name] = change(parts[name])
    save(tmp_path, damaged, described)
    with pytest.raises(CheckpointError, match=message):
        to_f32(open_checkpoint(tmp_path).tensors["a.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [600, 2**40]}, "cannot be"),
        ({"shape": [2**40, 600]}, "codes take|bytes are to hold"),
        ({"shape": [600, 2**29]}, "bytes are to hold 600 x 536870912 elements"),
        ({"shape": [600]}, "cannot be"),
        ({"shape": [0, 600]}, "cannot be"),
        ({"bits": 9}, "cannot be"),
        ({"bits": 3}, "codes take|entries are counted|zeros take"),
        ({"group_size": 0}, "cannot be"),
        ({"group_size": 601}, "cannot be"),
        ({"group_size": 7}, "scales are"),
        ({"storage": "coo"}, "cannot be"),
        ({"gap_bits": 9}, "cannot be"),
        ({"gap_bits": "1"}, "cannot be"),
        ({"more": 1}, "cannot be"),
    ],
)
@pytest.mark.parametrize("storage", ["dense", "csr", "csc"])
def test_a_header_that_says_what_cannot_be_is_named(
    tmp_path: Path, stored: dict[str, Any], storage: str, fields: dict[str, Any], message: str
) -> None:
    parts, described = stored[storage]
    save(tmp_path, parts, changed(described, **fields))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        to_f32(open_checkpoint(tmp_path).tensors["a.weight"])
    assert time.process_time() - start < 1


def test_other_versions_and_missing_files_are_named(tmp_path: Path, stored: dict[str, Any]) -> None:
    parts, described = stored["dense"]
    save(tmp_path, parts, described, version=2)
    with pytest.raises(UnsupportedError, match="packed in version 2, supported is 1"):
        open_checkpoint(tmp_path)
    save(tmp_path, parts, "[]")
    with pytest.raises(CheckpointError, match="`weights` in"):
        open_checkpoint(tmp_path)
    save(tmp_path, {**parts, "b.weight.codes": np.ones(3, np.uint8)}, described)
    with pytest.raises(CheckpointError, match=r"says nothing of b\.weight\.codes"):
        open_checkpoint(tmp_path)
    save(tmp_path, parts, described)
    save_file({"a.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight is in fastserve\.safetensors and in another file"):
        open_checkpoint(tmp_path)
    (tmp_path / PACKED_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"fastserve\.safetensors is missing"):
        open_checkpoint(tmp_path)


@given(data=st.data())
@settings(deadline=2000, max_examples=150)
def test_damage_never_raises_anything_but_our_errors_and_takes_no_memory(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged_sidecar"
    weight = random_grouped(
        20,
        30,
        bits=data.draw(st.sampled_from([3, 4, 8])),
        group_size=10,
        share_of_zeros=data.draw(st.sampled_from([0.0, 0.5, 0.95])),
        empty_columns=data.draw(st.sampled_from([0.0, 0.95])),
        is_asymmetric=data.draw(st.booleans()),
    )
    write_sidecar(folder, {"a.weight": weight})
    path = folder / PACKED_FILE
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.binary(min_size=1, max_size=4) | st.sampled_from([b"9", b"0", b"-", b"\xff" * 4])
        )
        content[at : at + len(piece)] = piece
    path.write_bytes(bytes(content[: data.draw(st.sampled_from([len(content)] * 4 + [len(content) // 2]))]))
    start = time.process_time()
    tracemalloc.start()
    with suppress(FastServeError):
        for tensor in open_checkpoint(folder).tensors.values():
            assert to_f32(tensor).shape == tensor.shape
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 1
    assert peak < 256 * 2**20


def test_scales_are_moved_and_not_rounded(tmp_path: Path) -> None:
    for scale_format, dtype in [
        (TensorFormat.BF16, torch.bfloat16),
        (TensorFormat.F16, torch.float16),
        (TensorFormat.F32, torch.float32),
    ]:
        weight = random_grouped(8, 32, bits=4, group_size=16, scale_format=scale_format)
        write_sidecar(tmp_path, {"a.weight": weight})
        with safe_open(tmp_path / PACKED_FILE, framework="pt") as file:
            scales = file.get_tensor("a.weight.scales")
        assert scales.dtype == dtype
        assert np.array_equal(scales.float().numpy(), weight.groups(0, 8).scales)
