"""Options of a run: checked when they are made, read from files, flags before files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastserve.cli.main import main
from fastserve.errors import OptionError
from fastserve.tune.options import TuneOptions, read_option_file
from tune.conftest import film_rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0 is out of range"),
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"batch_size": 3, "accumulation": 2}, "batch_size=3 is not a multiple"),
        ({"warmup": 1.5}, "warmup=1.5 is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is out of range"),
        ({"max_length": 4}, "max_length=4 is out of range"),
    ],
)
def test_an_option_out_of_its_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TuneOptions(**options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("options.toml", 'learning-rate = 3e-5\nmethod = "lora"\n'),
        ("options.yaml", "learning_rate: 3.0e-5\nmethod: lora\n"),
        ("plain.yaml", "learning_rate: 3e-5\nmethod: lora\n"),
        ("options.json", '{"learning_rate": 3e-5, "method": "lora"}'),
    ],
)
def test_options_are_read_from_files_of_three_kinds(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, "utf-8")
    assert read_option_file(path) == {"learning_rate": 3e-5, "method": "lora"}


def test_a_file_that_names_no_option_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text("lerning_rate = 1e-4", "utf-8")
    with pytest.raises(OptionError, match="'lerning_rate' is no option of tune"):
        read_option_file(path)


def test_flags_go_before_the_file_and_the_result_is_one_document(
    tiny_encoder: Path,
    write_rows: Callable[[str, list[dict[str, Any]]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows("rows", film_rows(16))
    config = tmp_path / "options.toml"
    config.write_text("epochs = 5\nbatch_size = 4\nseed = 7\nmax_length = 32\n", "utf-8")
    output = tmp_path / "out"
    command = ["tune", "text-classification", "--model", str(tiny_encoder), "--train", str(rows), "--json"]
    command += ["--output", str(output), "--config", str(config), "--epochs", "1", "--device", "cpu"]
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_steps"] == 4
    options = json.loads((output / "fastserve.json").read_text("utf-8"))["lineage"]["options"]
    assert (options["epochs"], options["batch_size"], options["seed"]) == (1.0, 4, 7)


def test_a_metric_without_dev_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "tune",
        "text-classification",
        "--model",
        "x",
        "--train",
        "y",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--metric", "f1"]) == 2
    assert "metric needs dev rows; give them with --dev" in capsys.readouterr().err
