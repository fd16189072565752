"""The example of compression runs as it is, on a few rows and a tiny model."""

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
