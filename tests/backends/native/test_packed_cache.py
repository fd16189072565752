from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

pytest.importorskip("fastserve._native")

from fastserve.backends.native import packed_cache
from fastserve.backends.native.executable import compile_native
from fastserve.backends.native.packed_cache import PackedCache, packed_bytes, packed_folder, prune
from fastserve.backends.native.weights import Weights
from fastserve.config import WeightFormat
from fastserve.errors import OptionError
from fastserve.graph.passes import optimize
from fastserve.types import Float32Array, Limits
from parity import run_logits, store_f32
from tiny_models import LLAMA_CONFIG, random_parameters, tiny_graph

LIMITS = Limits(max_tokens=16, max_outputs=16, max_sequences=1, num_blocks=2, max_context=32)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a model's tensors would be in, beside an empty store that keeps small models too."""
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTSERVE_PACKED_CACHE", raising=False)
    monkeypatch.setattr(packed_cache, "MIN_BYTES", 0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"tensors")
    return path


def run(model: Path, weights: WeightFormat = "int8") -> Float32Array:
    graph = tiny_graph(LLAMA_CONFIG)
    tensors = store_f32(random_parameters(graph))
    cache = PackedCache.of([model])
    executable = compile_native(optimize(graph), tensors, weights=weights, limits=LIMITS, cache=cache)
    return run_logits(executable, range(10))


def entries() -> list[Path]:
    return sorted(packed_folder().glob("*"))


@pytest.fixture
def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a weight was packed")

    monkeypatch.setattr(Weights, "_pack", refuse)


@pytest.mark.parametrize("weights", sorted(set(get_args(WeightFormat)) - {"stored"}))
def test_the_second_start_maps_what_the_first_packed(
    weights: WeightFormat, model: Path, request: pytest.FixtureRequest
) -> None:
    first = run(model, weights)
    request.getfixturevalue("no_packing")
    np.testing.assert_array_equal(run(model, weights), first)
    assert len(entries()) == 1


def test_a_model_that_changed_is_packed_again_and_its_old_entry_removed(model: Path) -> None:
    run(model)
    (old,) = entries()
    os.utime(model, ns=(0, 0))
    run(model)
    (new,) = entries()
    assert new != old


def test_each_format_has_an_entry_of_its_own(model: Path) -> None:
    run(model, "int8")
    run(model, "bf16")
    assert len(entries()) == 2


@pytest.mark.parametrize("damage", ["cut short", "another header", "empty", "another layout"])
def test_an_entry_that_is_not_whole_is_packed_again(
    damage: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(model)
    (entry,) = entries()
    whole = entry.read_bytes()
    match damage:
        case "cut short":
            entry.write_bytes(whole[:-1])
        case "another header":
            entry.write_bytes(whole.replace(b"identity", b"identitx", 1))
        case "empty":
            entry.write_bytes(b"")
        case "another layout":
            monkeypatch.setattr(packed_cache._native, "PACKED_LAYOUT", "another")
    np.testing.assert_array_equal(run(model), expected)
    assert whole in [path.read_bytes() for path in entries()] or damage == "another layout"


def test_a_full_disk_fails_no_run_and_leaves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with caplog.at_level("INFO"):
        run(model)
    assert entries() == []
    assert [record.message for record in caplog.records] == [
        "packed weights are not kept: [Errno 28] No space left on device"
    ]


def test_a_store_that_cannot_be_written_fails_no_run(model: Path) -> None:
    packed_folder().parent.mkdir(parents=True)
    packed_folder().write_bytes(b"a file where the folder should be")
    run(model)


def test_little_is_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "MIN_BYTES", 2**30)
    run(model)
    assert not packed_folder().exists()


def test_nothing_is_kept_where_the_environment_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_PACKED_CACHE", "0")
    assert PackedCache.of([model]) is None
    monkeypatch.setenv("FASTSERVE_PACKED_CACHE", "perhaps")
    with pytest.raises(OptionError, match="FASTSERVE_PACKED_CACHE=perhaps"):
        PackedCache.of([model])


def test_the_longest_unused_go_first_when_there_is_too_much(model: Path) -> None:
    for age, weights in enumerate(("int8", "bf16", "f32")):
        run(model, weights)  # type: ignore[arg-type]
        (new,) = [path for path in entries() if path.stat().st_mtime > 10]
        os.utime(new, (3 - age, 3 - age))
    run(model, "int8")  # used again
    sizes = {path: path.stat().st_size for path in entries()}
    longest_unused = min(sizes, key=lambda path: path.stat().st_mtime)
    assert prune(packed_bytes() - 1) == sizes[longest_unused]
    assert not longest_unused.exists()
    assert len(entries()) == 2


def test_entries_of_removed_models_go(model: Path) -> None:
    run(model)
    model.unlink()
    assert prune() > 0
    assert entries() == []
