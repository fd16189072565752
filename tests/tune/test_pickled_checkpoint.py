from __future__ import annotations

import json
import os
import pickle
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.cli.main import main
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.tune.pickled_checkpoint import open_pickled


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("is_archive", [True, False])
def test_tensors_are_those_that_torch_saved(folder: Path, is_archive: bool) -> None:
    random = torch.Generator().manual_seed(0)
    saved = {
        "a.weight": torch.randn((3, 5), generator=random).T,
        "b.LayerNorm.gamma": torch.randn(4, generator=random).bfloat16(),
        "c": torch.randn((2, 2), generator=random).half(),
        "embeddings.position_ids": torch.arange(3),
    }
    torch.save(saved, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_archive)
    tensors = open_pickled(folder).tensors
    assert list(tensors) == ["a.weight", "b.LayerNorm.weight", "c"]
    for name, tensor in tensors.items():
        expected = saved[name.replace("LayerNorm.weight", "LayerNorm.gamma")]
        assert np.array_equal(to_f32(tensor), expected.float().numpy())


def test_shards_are_read_by_their_index(folder: Path) -> None:
    for name in ("a", "b"):
        torch.save({name: torch.ones(2)}, folder / f"{name}.bin")
    index = {"weight_map": {"a": "a.bin", "b": "b.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert set(open_pickled(folder).tensors) == {"a", "b"}


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("made-by-a-pickle",))


@pytest.mark.parametrize("is_archive", [True, False])
def test_nothing_in_a_pickle_runs(folder: Path, is_archive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = folder / "pytorch_model.bin"
    if is_archive:
        torch.save({"a": Hostile()}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Hostile()}))
    with pytest.raises(CheckpointError, match="something else than tensors"):
        open_pickled(folder)
    assert not (folder / "made-by-a-pickle").exists()


def test_a_damaged_pickle_is_refused_in_time(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.ones(300)}, path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for position in random.integers(0, len(whole), 4):
            damaged[position] = random.integers(0, 256)
        path.write_bytes(bytes(damaged[: random.integers(1, len(whole) + 1)]))
        start = time.process_time()
        with suppress(CheckpointError, UnsupportedError):
            open_pickled(folder)
        assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([1], CheckpointError, "holds a list, no tensors by name"),
        ({"a": {"b": torch.ones(1)}}, CheckpointError, "'a' is no tensor but a dict"),
        ({"a": torch.ones(1, dtype=torch.int64)}, UnsupportedError, "element type torch.int64"),
    ],
)
def test_what_is_no_float_tensor_is_named(
    folder: Path, content: object, error: type[Exception], message: str
) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(error, match=message):
        open_pickled(folder)


def test_pickles_are_refused_with_the_remedy_which_works(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": torch.ones((2, 3))}, folder / "pytorch_model.bin")
    output = folder.parent / f"{folder.name}-output"
    command = ["convert", str(folder), "--to", "safetensors", "--output", str(output)]
    assert main(command) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert main([*command, "--allow-pickle"]) == 0
    assert "1 tensor kept as f32" in capsys.readouterr().out
    assert to_f32(open_checkpoint(output).tensors["a"]).tolist() == [[1, 1, 1]] * 2
