"""`fastserve compress` as scripts and people call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("fastserve._native")
pytest.importorskip("transformers")

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.cli.main import main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time, there was a little girl named Lily. She liked cats.\n" * 20, "utf-8")
    return path


@pytest.fixture
def stories(shared_data: Path) -> str:
    return str(shared_data / "model_stories260K")


def test_a_model_is_compressed_and_the_report_is_one_document(
    stories: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["compress", stories, "--recipe", "int8", "--output", str(output), "--data", str(text)]
    assert main([*command, "--budget", "size<=50% kl<=0.05", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["size"]["after_bytes"] == (output / "model.safetensors").stat().st_size
    assert document["quality"]["metrics"]["perplexity"]["after"]["value"] > 1
    assert document["budget"]["is_met"] is True
    assert document["is_refused"] is False
    assert document["speed"]["after"]["decode_ms"] > 0
    assert all(layer["errors"][0]["step"] == "rtn" for layer in document["layers"] if layer["errors"])
    card = json.loads((output / "fastserve.json").read_text("utf-8"))
    assert card["lineage"]["recipe"]["name"] == "int8"
    assert len(card["probes"]) == 3
    assert (output / "compression" / "report.html").is_file()
    assert "size<=50%" in (output / "README.md").read_text("utf-8")
    assert not output.with_name("out.run").exists()


def test_over_budget_is_refused_with_its_own_exit_code_until_it_is_accepted(
    stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["compress", stories, "--recipe", "int8", "--output", str(output), "--budget", "size<=10kB"]
    assert main(command) == 3
    shown = capsys.readouterr()
    assert "NOT met: size<=10kB" in shown.out
    assert shown.err == ""
    assert not output.exists()
    assert main([*command, "--accept"]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main([*command, "--accept", "--resume"]) == 0
    assert open_checkpoint(output).card["lineage"]["parent"]["model"] == stories
    assert "NOT met" in (output / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "int9"], "no recipe is named 'int9'; did you mean int8"),
        (["--recipe", "int4-gptq"], "calibrated on text; name a file of text"),
        (
            ["--recipe", "distill-half"],
            "recipe distill-half: distil tunes on rows; name a file of them with --train",
        ),
        (["--recipe", "int8", "--budget", "sise<=1MB"], "did you mean size"),
        (["--recipe", "int8", "--budget", "quality>=-1%"], "give such a file with --data"),
        (["--recipe", "int8", "--budget", "latency<=1ms"], "limit decode"),
        (["--recipe", "int8", "--data", "none.txt"], "no file is at none.txt"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    stories: str, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", stories, "--output", str(tmp_path / "out"), *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
