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
    assert capsys.readouterr().err.startswith("error: no model is named 'tiny'")


def test_on_a_terminal_the_list_is_aligned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["models", "list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "size", "licence", "source"]
    assert {line.index("not downloaded") for line in lines} == {header.index("source")}


def test_what_was_expanded_of_archives_that_are_gone_goes_with_a_removed_model(
    registered: str, empty_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = empty_store / "expanded" / "0123"
    (entry / "model").mkdir(parents=True)
    (entry / "model" / "model.safetensors").write_bytes(bytes(5000))
    source = {"folder": str(tmp_path / "gone"), "files": {}}
    (entry / "source.json").write_text(json.dumps(source))
    assert main(["models", "remove", registered, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] >= 5000
    assert not entry.exists()


def test_aliases_and_versions_are_made_promoted_listed_and_removed(
    registered: str, gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def documents(*arguments: str) -> dict[str, object]:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert documents("models", "alias", "Chat@1", "tiny") == {
        "name": "chat@1",
        "target": "tiny",
        "model": "tiny",
    }
    assert documents("models", "promote", "chat@1") == {"name": "chat", "version": "1", "previous": None}
    assert main(["models", "alias", "talk", "chat"]) == 0
    assert main(["models", "promote", "chat@1"]) == 0
    assert capsys.readouterr().out == "talk stands for tiny\nchat stands for chat@1\n"
    document = documents("models", "list")
    assert (document["aliases"], document["promoted"]) == ({"talk": "chat"}, {"chat": "1"})
    assert main(["models", "list"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [(line[0], line[3]) for line in lines] == [
        ("talk", "alias of chat"),
        ("chat@1", "version that is tiny, promoted to chat"),
    ]
    assert documents("models", "show", "talk")["name"] == "tiny"
    assert main(["models", "remove", "tiny"]) == 2
    assert "chat@1 stands for tiny" in capsys.readouterr().err
    for name in ("talk", "chat@1", "tiny"):
        assert documents("models", "remove", name)["name"] == name


def test_verifying_reads_every_byte(
    registered: str, gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "verify"]) == 0
    assert capsys.readouterr().out == "tiny: intact\n"
    content = bytearray(gguf_file.read_bytes())
    content[2000] ^= 1
    gguf_file.write_bytes(content)
    assert main(["models", "verify", "tiny"]) == 2
    assert capsys.readouterr().out.startswith("tiny: tiny.gguf does not match its sha256 ")
    assert main(["models", "verify", "--json"]) == 2
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["name"], model["is_intact"], len(model["damaged"])) == ("tiny", False, 1)
    assert main(["models", "verify", "tinny"]) == 2
    assert "did you mean tiny?" in capsys.readouterr().err


def test_the_catalogue_is_searched_for_all_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "search", "qwen3", "apache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name\tsize\tlicence\tarchitecture\there"
    assert [line.split("\t")[0] for line in lines[1:]] == ["qwen3-0.6b", "qwen3-1.7b"]
    assert main(["models", "search", "gemma", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert {entry["name"]: (entry["is_gated"], entry["is_here"]) for entry in found} == {
        "gemma-3-270m-it": (True, False),
        "gemma-3-1b-it": (True, False),
    }
    assert main(["models", "search", "mpnet-large"]) == 2
    assert "no model of the catalogue has 'mpnet-large'; did you mean" in capsys.readouterr().err
