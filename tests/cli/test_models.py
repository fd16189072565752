from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.cli.main import main
from fastserve.hub.catalogue import load_catalogue

pytestmark = pytest.mark.usefixtures("empty_store")


@pytest.fixture
def registered(gguf_file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The name of a model in the store."""
    assert main(["download", str(gguf_file)]) == 0
    capsys.readouterr()
    return "tiny"


def test_an_empty_store_lists_what_can_be_downloaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name\tsize\tlicence\tsource"
    assert [line.split("\t")[0] for line in lines[1:]] == [entry.name for entry in load_catalogue()]
    assert all(line.endswith("\tnot downloaded") for line in lines[1:])


def test_models_that_are_here_come_first(
    registered: str, gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"tiny\t4.0 kB\tunknown\t{gguf_file}"


def test_for_machines_the_list_is_a_document(registered: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in document["models"]] == [registered]
    assert [entry["name"] for entry in document["available"]] == [entry.name for entry in load_catalogue()]


def test_a_model_is_shown_with_its_files_and_checksums(
    registered: str, gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastserve.hub.record import sha256_of

    assert main(["models", "show", registered]) == 0
    shown = capsys.readouterr().out
    assert f"path      {gguf_file}\n" in shown
    assert f"tiny.gguf\t4.0 kB\t{sha256_of(gguf_file)}\n" in shown
    assert main(["models", "show", registered, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["sha256"] == sha256_of(gguf_file)


def test_a_removed_model_is_gone(
    registered: str, gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "remove", registered, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == registered
    assert gguf_file.exists()
    assert main(["models", "remove", registered]) == 2
    assert capsys.readouterr().err.startswith("error: no model is named 'tiny'; known names are ")


def test_on_a_terminal_the_list_is_aligned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["models", "list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "size", "licence", "source"]
    assert {line.index("not downloaded") for line in lines} == {header.index("source")}
