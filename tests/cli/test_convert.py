from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.cli.main import main
from fastserve.compress import precondition
from fastserve.evaluate.random_model import SHAPES, write_random_model

pytestmark = pytest.mark.usefixtures("empty_store")

TINY = {**SHAPES["smollm2-135m"], "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY |= {"head_dim": 32, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 320}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_random_model(TINY, tmp_path / "source")
    return tmp_path / "source"


def test_a_model_is_written_and_told_about(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = source.parent / "output"
    command = ["convert", str(source), "--to", "compressed-tensors", "--weights", "int4", "--output"]
    assert main([*command, str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["7 tensors rounded to int4 from bf16", "4 tensors kept as bf16"]
    assert lines[2].startswith(f"{output}: ")
    assert open_checkpoint(output).config["quantization_config"]["format"] == "pack-quantized"


def test_for_machines_one_document_is_printed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = source.parent / "output"
    assert main(["convert", str(source), "--to", "gguf", "--output", str(output), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["to"] == "gguf"
    assert document["size_bytes"] == sum(path.stat().st_size for path in output.iterdir())
    assert {"tensors": 8, "change": "kept as bf16", "reason": None} in document["changes"]


def test_what_cannot_be_written_is_one_line(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(source), "--to", "safetensors", "--weights", "int8"]
    assert main([*command, "--output", str(source.parent / "output")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: safetensors hold plain numbers, not weights='int8'; use --to compressed")
    assert not (source.parent / "output").exists()


def test_what_is_written_answers(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("compressed-tensors", "gguf", "safetensors"):
        output = str(source.parent / target)
        assert main(["convert", str(source), "--to", target, "--output", output]) == 0
        assert main(["generate", output, "hello", "--max-tokens", "3", "--weights", "stored"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("has_text", [True, False])
def test_w8a8_leaves_alone_what_loses_most(
    source: Path, capsys: pytest.CaptureFixture[str], has_text: bool
) -> None:
    """On a text, or on what the model writes itself."""
    text = source.parent / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"A text of {i} words, or more. " * 20}) + "\n" for i in range(40))
    )
    output = source.parent / "output"
    command = [
        "convert",
        str(source),
        "--to",
        "compressed-tensors",
        "--weights",
        "w8a8",
        "--output",
        str(output),
    ]
    assert main([*command, *(["--calibration", str(text)] if has_text else []), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rounded = [change for change in document["changes"] if "rounded to w8a8" in change["change"]]
    assert sum(change["tensors"] for change in rounded) == 7
    (remark,) = document["remarks"]
    assert "matrices meet activations as they are" in remark
    assert main(["generate", str(output), "hello", "--max-tokens", "3"]) == 0


def test_calibration_is_for_w8a8(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(source), "--to", "gguf", "--calibration", "text.txt", "--output"]
    assert main([*command, str(source.parent / "output")]) == 2
    assert "--calibration is for --to compressed-tensors --weights w8a8" in capsys.readouterr().err


def test_w8a8_says_which_extra_it_needs(
    source: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precondition, "find_spec", lambda name: None)
    command = ["convert", str(source), "--to", "compressed-tensors", "--weights", "w8a8", "--output"]
    assert main([*command, str(source.parent / "output")]) == 2
    assert "needs torch" in (said := capsys.readouterr().err)
    assert "fastserve-llm[compress]" in said
