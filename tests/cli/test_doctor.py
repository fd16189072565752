from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastserve.cli import diagnosis
from fastserve.cli.main import main

pytest.importorskip("fastserve._native")
pytestmark = pytest.mark.usefixtures("empty_store")


@pytest.fixture(autouse=True)
def _best_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSERVE_ISA", raising=False)


def examine(capsys: pytest.CaptureFixture[str], *, exit_code: int) -> dict[str, Any]:
    """The checks of `fastserve doctor --json`, by name."""
    assert main(["doctor", "--json"]) == exit_code
    document = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in document["checks"]}
    assert document["problems"] == sum(check["status"] == "problem" for check in checks.values())
    return checks


def test_a_sound_installation_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    from fastserve.backends.native.executable import runnable_isas

    checks = examine(capsys, exit_code=0)
    assert {check["status"] for check in checks.values()} <= {"ok", "warning"}
    assert checks["instructions"]["facts"] == {"isa": runnable_isas()[0], "runnable": runnable_isas()}
    assert 1 <= checks["processor"]["facts"]["threads"] <= checks["processor"]["facts"]["cores_online"]
    assert checks["self-test"]["facts"]["chunks_agree"] is True


def test_people_get_a_line_for_every_check_and_the_count_of_problems(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None)  # a warning: there is no pip
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[1] for line in lines if line.startswith(("ok", "warning", "problem "))]
    assert found == [check.name for check in diagnosis.diagnose()]
    assert lines[-1] == "problems: 0, warnings: 1"


def test_people_whose_installation_is_sound_read_that_all_is_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = diagnosis.Check(name="store", finding="there")
    monkeypatch.setattr(diagnosis, "diagnose", lambda: [check])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok       store  there\n\nall is well\n"


def test_how_sparse_weights_are_kept_is_told_once_it_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastserve.backends.native.executable import make_runtime
    from fastserve.backends.native.storage_choice import ROWS, SpeedTable, StorageChoice
    from fastserve.engine.processor import processor_name

    assert "first loaded" in examine(capsys, exit_code=0)["sparsity"]["finding"]
    choice, runtime = StorageChoice(processor_name()), make_runtime()
    choice._keep(runtime, "int8 g0 x64", SpeedTable({"csr": {rows: [0.5, 2.0] for rows in ROWS}}))
    check = examine(capsys, exit_code=0)["sparsity"]
    assert check["finding"] == "int8 g0 x64: csr from 93% zeros"
    assert check["facts"] == {"int8 g0 x64": [{"zeros": 0.93, "storage": "csr"}]}


def test_an_unknown_instruction_set_is_a_problem_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTSERVE_ISA", "abacus")
    checks = examine(capsys, exit_code=2)
    assert checks["instructions"]["status"] == "problem"
    assert "'abacus'" in checks["instructions"]["finding"]
    assert "portable" in checks["instructions"]["remedy"]
    assert checks["processor"]["status"] == "ok"
    assert main(["doctor"]) == 2
    assert "hint: runnable here: " in capsys.readouterr().out


def test_a_slower_instruction_set_than_need_be_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastserve.backends.native import executable

    monkeypatch.setenv("FASTSERVE_ISA", "portable")
    monkeypatch.setattr(executable, "runnable_isas", lambda: ["swift", "portable"])
    checks = examine(capsys, exit_code=0)
    assert checks["instructions"]["status"] == "warning"
    assert checks["instructions"]["remedy"] == "unset FASTSERVE_ISA"


def test_a_store_that_cannot_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "file" / "store"))
    check = examine(capsys, exit_code=2)["store"]
    assert check["status"] == "problem"
    assert check["finding"].endswith("file is not a folder")
    assert check["facts"]["is_writable"] is False


def test_a_store_whose_disk_is_nearly_full_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    check = examine(capsys, exit_code=0)["store"]
    assert (check["status"], check["facts"]["free_bytes"]) == ("warning", 5_000_000)


def test_looking_makes_no_store(empty_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examine(capsys, exit_code=0)
    assert not empty_store.exists()


def test_models_are_named_and_damaged_ones_are_a_problem(
    gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", str(gguf_file)]) == 0
    capsys.readouterr()
    assert examine(capsys, exit_code=0)["models"]["facts"] == {"names": ["tiny"]}
    gguf_file.write_bytes(b"GGUF")
    check = examine(capsys, exit_code=2)["models"]
    assert (check["status"], check["facts"]["damaged"]) == ("problem", ["tiny"])
    assert check["remedy"] == "run `fastserve download tiny`"


def test_the_offline_setting_is_told_and_a_bad_one_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTSERVE_OFFLINE", "1")
    assert examine(capsys, exit_code=0)["network"]["facts"] == {"is_offline": True}
    monkeypatch.setenv("FASTSERVE_OFFLINE", "perhaps")
    assert examine(capsys, exit_code=2)["network"]["status"] == "problem"


def test_what_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None)
    checks = examine(capsys, exit_code=0)
    assert checks["optional"]["facts"] == {"torch": None, "transformers": None}
    assert (checks["pip"]["status"], checks["pip"]["remedy"]) == ("warning", "run `python -m ensurepip`")


def test_little_memory_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastserve.engine import available_memory

    monkeypatch.setattr(available_memory, "available_memory_bytes", lambda: 1_000_000)
    check = examine(capsys, exit_code=0)["memory"]
    assert (check["status"], check["facts"]["available_bytes"]) == ("warning", 1_000_000)


def test_kernels_that_compute_wrongly_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastserve.backends.native import self_test

    monkeypatch.setattr(self_test, "EXPECTED_LOGITS", self_test.EXPECTED_LOGITS[::-1])
    check = examine(capsys, exit_code=2)["self-test"]
    assert check["status"] == "problem"
    assert "is wrong" in check["finding"]


def test_a_part_that_cannot_be_imported_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fastserve.backends.native.executable", None)
    checks = examine(capsys, exit_code=2)
    assert checks["instructions"]["remedy"] == "install FastServe again for this Python"
    assert checks["store"]["status"] == "ok"
