from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.safetensors import only_tensors, read_safetensors, read_sharded_safetensors
from fastserve.errors import CheckpointError, FastServeError, UnsupportedError


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def content_of(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def is_accepted_by_library(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return file is not None
    except (SafetensorError, OSError):
        return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_that_the_library_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    random = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0, 4)}
    saved = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    save_file(saved, path, metadata={"format": "pt"})
    read = read_safetensors(path)
    assert {name: tensor.shape for name, tensor in read.items()} == shapes
    for name, tensor in load_file(path).items():
        assert np.array_equal(to_f32(only_tensors(path, read)[name]), tensor.float().numpy())


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    data = read_safetensors(path)["x"].data
    assert data.base is not None
    assert not data.flags.writeable


def test_position_ids_and_inverse_frequencies_of_old_exports_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(
        {
            "embeddings.position_ids": torch.arange(8),
            "layers.0.rotary_emb.inv_freq": torch.ones(4),
            "weight": torch.ones(2),
        },
        path,
    )
    assert list(read_safetensors(path)) == ["weight"]


def test_an_element_type_that_we_do_not_have_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"quantized": torch.ones(4, dtype=torch.int8)}, path)
    with pytest.raises(
        UnsupportedError, match="'quantized' has element type I8, supported are F32, F16, BF16"
    ):
        only_tensors(path, read_safetensors(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\0" * 7, "is truncated: 7 bytes"),
        (b"\xff" * 16, r"header claims \d+ bytes, the limit is 8"),
        (content_of({}, b"")[:-1], "header claims 2 bytes, the limit is 1"),
        (content_of(b"[]", b""), "does not start with"),
        (content_of(b"{", b""), "is not valid JSON"),
        (content_of(b'{"a":' * 100_000, b""), "is not valid JSON"),
        (content_of(b'{"a":' + b"9" * 10_000 + b"}", b""), "is not valid JSON"),
        (content_of(b'{"\xff":1}', b""), "is not valid JSON"),
        (content_of(b'{"a":{},"a":{}}', b""), "key 'a' is repeated"),
        (content_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
        (content_of({"a": 1}, b""), "entry of tensor 'a' is malformed"),
        (content_of({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "entry of tensor 'a' is malformed"),
        (content_of({"a": entry("F32", [1], 4, 0)}, bytes(4)), "entry of tensor 'a' is malformed"),
        (content_of({"a": entry("F32", [True], 0, 4)}, bytes(4)), "entry of tensor 'a' is malformed"),
        (content_of({"a": entry("F32", [1.0], 0, 4)}, bytes(4)), "entry of tensor 'a' is malformed"),  # type: ignore[list-item]
        (content_of({"a": entry("F32", [2], 0, 4)}, bytes(4)), r"'a' spans 4 bytes, F32 \[2\] needs 8"),
        (content_of({"a": entry("F32", [2**32, 2**32], 0, 4)}, bytes(4)), "'a' spans 4 bytes"),
        (content_of({"a": entry("F32", [1], 0, 4)}, bytes(3)), "need 4 bytes .*, the file holds 3"),
        (content_of({"a": entry("F32", [1], 0, 4)}, bytes(5)), "need 4 bytes .*, the file holds 5"),
        (content_of({"a": entry("F32", [1], 4, 8)}, bytes(8)), "'a' begins at byte 4, .* ends at 0"),
        (
            content_of({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
            "'b' begins at byte 4, the previous one ends at 8",
        ),
    ],
)  # fmt: skip
def test_a_corrupt_file_is_refused_here_as_by_the_library(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = write(tmp_path / "model.safetensors", content)
    assert not is_accepted_by_library(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert "model.safetensors" in str(caught.value)


@given(data=st.data())
@settings(deadline=1000, max_examples=300)
def test_a_damaged_file_is_refused_whenever_the_library_refuses_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header = {
        "a": entry("F32", [2, 3], 0, 24),
        "b": entry("BF16", [4], 24, 32),
        "__metadata__": {"format": "pt"},
    }
    content = bytearray(content_of(header, bytes(32)))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        damage = data.draw(
            st.binary(min_size=1, max_size=2) | st.sampled_from([b"0", b"9", b"-", b'"', b"[", b"}"])
        )
        content[position : position + len(damage)] = damage
    cut = data.draw(st.sampled_from([len(content)] * 3 + [20, 60, len(content) - 1]))
    path = write(tmp_path_factory.getbasetemp() / "damaged.safetensors", bytes(content[:cut]))
    try:
        read_safetensors(path)
    except FastServeError:
        return
    assert is_accepted_by_library(path)


@pytest.fixture
def shards(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Two shards, holding `a` and `b`, under an index of the given weight map."""
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.full((3,), 2.0)}, tmp_path / "two.safetensors")

    def write_index(weight_map: dict[str, str]) -> Path:
        return write(
            tmp_path / "model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode()
        )

    return write_index


def test_shards_are_read_as_one(shards: Callable[[dict[str, str]], Path]) -> None:
    index = shards({"a": "one.safetensors", "b": "two.safetensors"})
    tensors = only_tensors(index, read_sharded_safetensors(index))
    assert {name: to_f32(tensor).tolist() for name, tensor in tensors.items()} == {
        "a": [1, 1],
        "b": [2, 2, 2],
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, "1 tensors are in no shard, among them 'b'"),
        ({"b": "two.safetensors", "c": "one.safetensors"}, "'a' lies in one.safetensors"),
        ({"a": "../one.safetensors"}, "'../one.safetensors' is not the name of a .safetensors file"),
        ({"a": "one.bin"}, "is not the name of a .safetensors file"),
        ({"a": "three.safetensors"}, "three.safetensors cannot be read"),
        ({"a": 1}, "weight_map is missing or does not map"),
    ],
)  # fmt: skip
def test_an_index_that_contradicts_its_shards_is_refused(
    shards: Callable[[dict[str, Any]], Path], weight_map: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_sharded_safetensors(shards(weight_map))
