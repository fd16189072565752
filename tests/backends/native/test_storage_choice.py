from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

pytest.importorskip("fastserve._native")

from fastserve import _native
from fastserve.backends.native import storage_choice
from fastserve.backends.native.executable import compile_native, make_runtime
from fastserve.backends.native.packed_cache import PackedCache
from fastserve.backends.native.storage_choice import ROWS, ZEROS, SpeedTable, StorageChoice
from fastserve.backends.native.storage_speed import Trial, measure_speeds
from fastserve.backends.native.weight_scheme import SCHEMES, Storage, WeightScheme
from fastserve.backends.native.weights import Weights
from fastserve.graph.node import Parameter
from fastserve.graph.passes import optimize
from fastserve.types import Float32Array, Limits
from parity import run_logits, store_f32
from tiny_models import LLAMA_CONFIG, random_parameters, tiny_graph

INT8 = SCHEMES["int8"]
LIMITS = Limits(max_tokens=16, max_outputs=16, max_sequences=1, num_blocks=2, max_context=32)


def table(**speeds: Sequence[float]) -> SpeedTable:
    """The same speeds for all rows."""
    return SpeedTable({name: dict.fromkeys(ROWS, by_zeros) for name, by_zeros in speeds.items()})  # type: ignore[misc]


BITMASK_THEN_CSR = table(bitmask=[0.8, 1.2, 1.6, 1.7, 1.8, 1.9], csr=[1.6, 1.9, 2.5])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The shares of zeros that were measured: with made-up speeds, by which CSR wins from two thirds on."""
    shares: list[float] = []

    def measure(
        runtime: _native.Runtime,
        scheme: WeightScheme,
        zeros: float,
        rows: Sequence[int],
        *,
        storages: Sequence[Storage],
    ) -> dict[Storage, dict[int, float]]:
        shares.append(zeros)
        speeds = {"bitmask": 1 + zeros / 2, "csr": 2 * zeros}
        return {name: dict.fromkeys(rows, speeds[name]) for name in storages}

    monkeypatch.setattr(storage_choice, "measure_speeds", measure)
    return shares


@pytest.mark.parametrize(
    ("zeros", "storage"),
    [(0.0, "dense"), (0.29, "dense"), (0.35, "bitmask"), (0.85, "bitmask"), (0.95, "csr"), (1.0, "csr")],
)
def test_the_fastest_storage_is_chosen(zeros: float, storage: Storage) -> None:
    assert BITMASK_THEN_CSR.choose(zeros) == storage


def test_one_row_counts_more_than_a_few_and_many_together() -> None:
    for speeds, storage in (
        ([1.15, 0.6, 0.8], "dense"),
        ([1.2, 0.6, 0.8], "csr"),
        ([0.5, 2.0, 2.0], "dense"),
    ):
        by_rows = {rows: [speed] for rows, speed in zip(ROWS, speeds, strict=True)}
        assert SpeedTable({"csr": by_rows}).choose(0.95) == storage
    assert table(csr=[0.999]).choose(0.95) == "dense"
    assert table(csr=[1.001]).choose(0.95) == "csr"


def test_more_zeros_are_never_taken_for_slower() -> None:
    noisy = table(bitmask=[1.3, 0.9, 1.2, 1.2, 1.2, 1.2])
    assert [share for share, _ in noisy.break_evens()] == [ZEROS[0]]


def test_break_evens_are_where_the_choice_changes() -> None:
    (bitmask_from, bitmask), (csr_from, csr) = BITMASK_THEN_CSR.break_evens()
    assert (bitmask, csr) == ("bitmask", "csr")
    for share, before in ((bitmask_from, "dense"), (csr_from, "bitmask")):
        assert BITMASK_THEN_CSR.choose(share - 0.01) == before
        assert BITMASK_THEN_CSR.choose(share) != before


def test_speeds_are_measured_once_and_kept(measured: list[float], tmp_path: Path) -> None:
    path = tmp_path / "store" / "speed.json"
    runtime = make_runtime(1)
    first = StorageChoice("a machine", path).choose(runtime, INT8, 0.5)
    assert measured == list(ZEROS)
    assert StorageChoice("a machine", path).choose(runtime, INT8, 0.5) == first == "bitmask"
    assert StorageChoice("a machine", path).choose(runtime, INT8, 0.95) == "csr"
    assert measured == list(ZEROS)
    assert [p.name for p in path.parent.iterdir()] == ["speed.json"]


def test_each_machine_instruction_set_and_kind_of_weights_has_speeds_of_its_own(
    measured: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "speed.json"
    for index, (machine, isa, scheme) in enumerate(
        [
            ("one", "portable", INT8),
            ("two", "portable", INT8),
            ("one", _native.runnable_isas()[0], INT8),
            ("one", "portable", SCHEMES["int4"]),
        ]
    ):
        runtime = make_runtime(1, isa)
        for _ in range(2):
            StorageChoice(machine, path).choose(runtime, scheme, 0.5)
        assert len(measured) == (index + 1) * len(ZEROS)


def test_dense_weights_are_not_measured(measured: list[float], tmp_path: Path) -> None:
    choice = StorageChoice("a machine", tmp_path / "speed.json")
    assert choice.choose(make_runtime(1), INT8, 0.02) == "dense"
    assert choice.choose(make_runtime(1), SCHEMES["int4"], 0.2) == "dense"
    assert measured == []
    assert not choice.path.exists()


@pytest.mark.parametrize(
    "damage", ["empty", "no JSON", "a list", "no tables", "no speeds", "negative", "other rows", "too many"]
)
def test_a_damaged_file_is_measured_again(damage: str, measured: list[float], tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    choice, runtime = StorageChoice("a machine", path), make_runtime(1)
    expected = choice.choose(runtime, INT8, 0.5)
    ((key, kinds),) = json.loads(path.read_text()).items()
    ((kind, speeds),) = kinds.items()
    rows = str(next(iter(ROWS)))
    match damage:
        case "empty":
            text = ""
        case "no JSON":
            text = path.read_text()[:-5]
        case "a list":
            text = "[]"
        case "no tables":
            text = json.dumps({key: 1})
        case "no speeds":
            text = json.dumps({key: {kind: {}}})
        case "negative":
            speeds["bitmask"][rows][0] = -1
            text = json.dumps({key: {kind: speeds}})
        case "other rows":
            del speeds["bitmask"][rows]
            text = json.dumps({key: {kind: speeds}})
        case "too many":
            speeds["bitmask"][rows] *= 2
            text = json.dumps({key: {kind: speeds}})
    path.write_text(text)
    assert StorageChoice("a machine", path).choose(runtime, INT8, 0.5) == expected
    assert len(measured) == 2 * len(ZEROS)
    assert choice.tables(runtime).keys() == {kind}


def test_a_store_that_cannot_be_written_fails_no_run(measured: list[float], tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"a file where the folder should be")
    choice, runtime = StorageChoice("a machine", tmp_path / "store" / "x.json"), make_runtime(1)
    for _ in range(2):  # the second matrix of a model
        assert choice.choose(runtime, INT8, 0.5) == "bitmask"
    assert len(measured) == len(ZEROS)


@pytest.mark.parametrize("scale_format", ["bf16", "f16"])
def test_measured_speeds_are_of_every_storage_and_number_of_rows(
    scale_format: Literal["bf16", "f16"],
) -> None:
    """Also for scales of float16, which only a file has."""
    trial = Trial(width=64, depth=128, copies=2, seconds=0)
    scheme = replace(INT8, scale_format=scale_format)
    speeds = measure_speeds(make_runtime(1), scheme, 0.9, (1, 20), trial=trial)
    assert {name: set(by_rows) for name, by_rows in speeds.items()} == {
        "bitmask": {1, 20},
        "csr": {1, 20},
    }
    assert all(speed > 0 for by_rows in speeds.values() for speed in by_rows.values())


def run_sparse_model(
    cache: PackedCache | None, choice: StorageChoice | None, isa: str | None = None
) -> Float32Array:
    graph = optimize(tiny_graph(LLAMA_CONFIG))
    rng = np.random.default_rng(2)
    parameters = {
        name: np.where(rng.random(array.shape) < 0.9, 0, array).astype(np.float32)
        if array.ndim == 2
        else array
        for name, array in random_parameters(tiny_graph(LLAMA_CONFIG)).items()
    }
    executable = compile_native(
        graph,
        store_f32(parameters),
        weights="int8",
        limits=LIMITS,
        cache=cache,
        storage_choice=choice,
        isa=isa,
    )
    return run_logits(executable, range(10))


def test_a_model_gives_the_same_bits_however_it_is_stored(
    measured: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Chosen at the first start, mapped at the second, packed again where the entry was damaged."""
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTSERVE_PACKED_CACHE", raising=False)
    monkeypatch.setattr("fastserve.backends.native.packed_cache.MIN_BYTES", 0)
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"tensors")
    cache, choice = PackedCache.of([model]), StorageChoice("a machine")
    dense = run_sparse_model(None, None)
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(run_sparse_model(cache, choice), dense)
    assert "matrices by storage:" in caplog.text
    assert "csr" in caplog.text

    packed: list[Parameter] = []
    pack = Weights._pack

    def count(self: Weights, parameter: Parameter) -> _native.Weight:
        packed.append(parameter)
        return pack(self, parameter)

    monkeypatch.setattr(Weights, "_pack", count)
    np.testing.assert_array_equal(run_sparse_model(cache, choice), dense)
    assert packed == []
    (entry,) = (tmp_path / "home" / "packed").glob("*")
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2] + b"\xff" * 4096 + whole[len(whole) // 2 + 4096 :])
    np.testing.assert_array_equal(run_sparse_model(cache, choice), dense)
    assert packed
    assert "is damaged in the store and packed again" in caplog.text
    assert entry.read_bytes() == whole
    packed.clear()
    run_sparse_model(cache, choice, isa="portable")
    assert packed, "what was chosen for other kernels was mapped"


def test_schemes_that_csr_cannot_hold_are_measured_without_it() -> None:
    whole_rows = replace(INT8, activation_group_size=0)
    trial = Trial(width=64, depth=128, copies=2, seconds=0)
    assert set(measure_speeds(make_runtime(1), whole_rows, 0.9, (1,), trial=trial)) == {"bitmask"}
