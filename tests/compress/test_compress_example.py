"""The examples of compression run as they are, on few rows and tiny models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastserve._native")
pytest.importorskip("constriction")

from tune.conftest import tiny_encoder as tiny_encoder

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "compress_minilm.py"


def test_an_encoder_is_tuned_pruned_quantized_archived_and_served(
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "home"))
    arguments = ["--model", str(tiny_encoder), "--rows", "12", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    output = capfd.readouterr().out
    assert "archive, MB" in output
    assert "top1_agreement" in output
    assert output.rstrip().splitlines()[-1].startswith("slow, cold and dull: ")


@pytest.mark.usefixtures("without_speed")
def test_a_decoder_is_made_to_keep_a_budget(
    stories_folder: Path,
    story_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    example = EXAMPLE.with_name("smollm2_under_budget.py")
    arguments = ["--model", str(stories_folder), "--text", str(story_file), "--output", str(tmp_path / "out")]
    arguments += ["--budget", "size<=60% quality>=-50%", "--sequences", "2", "--limit", "1", "--trials", "1"]
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    runpy.run_path(str(example), run_name="__main__")
    output = capfd.readouterr().out
    assert "int8-all | " in output
    assert "chosen" in output
    assert (tmp_path / "out" / "compression" / "front.png").exists()
