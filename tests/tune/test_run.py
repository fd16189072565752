"""Tuning runs from rows to a model directory, on a tiny random encoder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fastserve.errors import DataError, OptionError
from fastserve.tune import TuneOptions, tune
from tune.conftest import OVERLAP_KEPT, city_rows, film_rows

QUICK = TuneOptions(epochs=8, batch_size=8, learning_rate=5e-3, device="cpu", max_length=32)
"""Enough for a tiny model to learn what one word tells."""

WriteRows = Callable[[str, list[dict[str, Any]]], Path]


def test_a_classifier_learns_its_rows_and_becomes_a_folder_that_transformers_opens(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    train, dev = write_rows("train", film_rows(64)), write_rows("dev", film_rows(20))
    result = tune(
        "text-classification",
        model=str(tiny_encoder),
        train=train,
        dev=dev,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=QUICK,
    )
    assert result.metrics["accuracy"] == 1.0
    settings = json.loads((result.path / "fastserve.json").read_text("utf-8"))
    assert settings["task"] == "text-classification"
    assert settings["metrics"] == result.metrics
    assert settings["lineage"]["rows"] == {"train": 64, "dev": 20}
    model = AutoModelForSequenceClassification.from_pretrained(result.path)
    assert model.config.id2label == {0: "n", 1: "y"}
    assert {path.name for path in (result.path / "training").iterdir()} >= {
        "loss.png",
        "curves.html",
        "log.jsonl",
    }
    assert "| accuracy | 1.0000 |" in (result.path / "README.md").read_text("utf-8")
    assert not result.path.with_name("out.run").exists()


def test_a_tagger_finds_whole_entities(tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    train, dev = write_rows("train", city_rows(48)), write_rows("dev", city_rows(12))
    result = tune(
        "token-classification",
        model=str(tiny_encoder),
        train=train,
        dev=dev,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=QUICK,
    )
    assert result.metric == "f1"
    assert result.metrics["f1"] == 1.0


def test_the_best_weights_are_kept_and_a_run_that_gets_no_better_stops(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    # The dev rows say the opposite of the training rows: every step makes their loss worse.
    train = write_rows("train", film_rows(64))
    dev = write_rows("dev", [{**row, "label": "ny"[row["label"] == "n"]} for row in film_rows(20)])
    seen: list[float] = []
    options = TuneOptions(
        epochs=20, batch_size=8, learning_rate=5e-3, device="cpu", metric="loss", patience=2, max_length=32
    )
    result = tune(
        "text-classification",
        model=str(tiny_encoder),
        train=train,
        dev=dev,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=options,
        on_evaluate=lambda step, metrics: seen.append(metrics["loss"]),
    )
    assert len(seen) < 20
    assert result.metrics["loss"] == pytest.approx(min(seen), rel=1e-5)
    assert min(seen) < seen[-1]


def test_a_metric_that_the_task_does_not_have_is_an_error_before_training(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows("rows", film_rows(8))
    with pytest.raises(OptionError, match="metric='bleu' is none of text-classification"):
        tune(
            "text-classification",
            model=str(tiny_encoder),
            train=rows,
            dev=rows,
            on_problem=OVERLAP_KEPT,
            output=tmp_path / "out",
            options=TuneOptions(metric="bleu"),
        )
    assert not (tmp_path / "out.run").exists()


def test_a_label_that_no_training_row_has_is_named_with_file_and_line(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    train = write_rows("train", film_rows(8))
    dev = write_rows("dev", [*film_rows(2), {"text": "the film", "label": "maybe"}])
    with pytest.raises(DataError, match=r"dev\.jsonl:3: label 'maybe' is not in training"):
        tune(
            "text-classification",
            model=str(tiny_encoder),
            train=train,
            dev=dev,
            on_problem=OVERLAP_KEPT,
            output=tmp_path / "out",
            options=QUICK,
        )


def test_an_output_that_is_there_is_not_overwritten(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows("rows", film_rows(8))
    (tmp_path / "out").mkdir()
    with pytest.raises(OptionError, match="is there already"):
        tune("text-classification", model=str(tiny_encoder), train=rows, output=tmp_path / "out")


def command_line(model: Path, train: Path, dev: Path, output: Path) -> list[str]:
    """A run of 24 steps with a checkpoint after every third."""
    return [
        *(sys.executable, "-m", "fastserve.cli.main", "tune", "text-classification", "--json"),
        *("--model", str(model), "--train", str(train), "--dev", str(dev), "--output", str(output)),
        *("--epochs", "3", "--batch-size", "8", "--learning-rate", "0.002", "--device", "cpu"),
        *("--eval-steps", "5", "--save-steps", "3", "--seed", "3", "--on-problem", "split-overlap=keep"),
    ]


def test_a_run_that_is_killed_and_resumed_ends_in_the_same_weights_bit_for_bit(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    train, dev = write_rows("train", film_rows(61)), write_rows("dev", film_rows(20))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        command_line(tiny_encoder, train, dev, whole), check=True, env=environment, capture_output=True
    )

    command = command_line(tiny_encoder, train, dev, killed)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = killed.with_name("killed.run")
    while not (run / "checkpoints" / "checkpoint-6").is_dir():  # being written: the one before is whole
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()

    again = subprocess.run(
        [*command, "--resume"], check=True, env=environment, capture_output=True, text=True
    )
    assert json.loads(again.stdout)["resumed_at"] in range(3, 24)
    left, right = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert left.keys() == right.keys()
    assert all((left[name] == right[name]).all() for name in left)
    losses = [
        (folder / "training" / "log.jsonl").read_text("utf-8").count("eval_loss")
        for folder in (whole, killed)
    ]
    assert losses[0] == losses[1]


def test_resuming_with_another_option_is_refused_by_its_name(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows("rows", film_rows(8))

    def stop(step: int, metrics: dict[str, float]) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        tune(
            "text-classification",
            model=str(tiny_encoder),
            train=rows,
            dev=rows,
            on_problem=OVERLAP_KEPT,
            output=tmp_path / "out",
            options=QUICK,
            on_evaluate=stop,
        )
    with pytest.raises(OptionError, match=r"seed=1 differs from 0"):
        tune(
            "text-classification",
            model=str(tiny_encoder),
            train=rows,
            dev=rows,
            on_problem=OVERLAP_KEPT,
            output=tmp_path / "out",
            options=TuneOptions(
                epochs=8, batch_size=8, learning_rate=5e-3, device="cpu", max_length=32, seed=1
            ),
            resume=True,
        )
