"""What was tuned, evaluated: natively as the trainer saw it, against PyTorch, and by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastserve.cli.main import main
from fastserve.config import EngineOptions
from fastserve.data import load_data
from fastserve.engine.load import plan_model
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.task_evaluation import evaluate_folder
from fastserve.tune import TuneOptions, tune
from tune.conftest import OVERLAP_KEPT, city_rows, film_rows
from tune.test_tasks import (
    choice_rows,
    near_rows,
    number_rows,
    pair_rows,
    question_rows,
    relation_rows,
    several_label_rows,
)

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
SHORT = TuneOptions(epochs=2, batch_size=8, learning_rate=5e-3, device="cpu", max_length=32, stride=8)
# Until numbers differ by more than roundings, of which a correlation would be one.
LONGER = replace(SHORT, epochs=8, learning_rate=2e-2)
CASES: dict[str, tuple[str, Callable[[int], list[dict[str, Any]]]]] = {
    "classes": ("text-classification", film_rows),
    "several": ("text-classification", several_label_rows),
    "number": ("text-classification", number_rows),
    "pair": ("pair-classification", pair_rows),
    "tags": ("token-classification", city_rows),
    "relation": ("relation-extraction", relation_rows),
    "answer": ("question-answering", question_rows),
    "choice": ("multiple-choice", choice_rows),
    "embedding": ("embedding", near_rows),
}


@pytest.mark.parametrize("case", CASES)
def test_the_native_runtime_scores_as_the_trainer_did(
    case: str, tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    task, make = CASES[case]
    train, dev = write_rows("train", make(32)), write_rows("dev", make(12))
    result = tune(
        task,
        model=str(tiny_encoder),
        train=train,
        dev=dev,
        on_problem=OVERLAP_KEPT,
        output=tmp_path / "out",
        options=LONGER if case == "number" else SHORT,
    )
    assert plan_model(result.path, EngineOptions()).context_length == 256  # of the base, not of the training
    evaluation = evaluate_folder(
        result.path, load_data(dev, task), PredictorOptions(backend="native", weights="f32")
    )
    assert evaluation.backend == "native"
    expected = {name: value for name, value in result.metrics.items() if name != "loss"}
    assert evaluation.scores.metrics == pytest.approx(expected, abs=1e-3)


def test_predictions_of_torch_and_of_the_native_runtime_are_alike(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    train = write_rows("train", film_rows(32))
    result = tune(
        "text-classification", model=str(tiny_encoder), train=train, output=tmp_path / "out", options=SHORT
    )
    rows = load_data(train, "text-classification")
    native, torch = (
        evaluate_folder(result.path, rows, PredictorOptions(backend=backend, weights="f32")).predictions
        for backend in ("native", "torch")
    )
    for ours, theirs in zip(native, torch, strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-3)


def test_the_command_line_compares_two_models_and_writes_a_report(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows("train", film_rows(40))
    paths = []
    for name, options in (("good", replace(SHORT, epochs=10)), ("bad", replace(SHORT, learning_rate=1e-6))):
        result = tune(
            "text-classification",
            model=str(tiny_encoder),
            train=train,
            output=tmp_path / name,
            options=options,
        )
        paths.append(result.path)
    command = ["evaluate", str(paths[0]), "--data", str(train), "--compare", str(paths[1]), "--json"]
    report = tmp_path / "report"
    assert main([*command, "--resamples", "50", "--report", str(report)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["metrics"]["accuracy"] == 1.0
    difference = document["compare"]["difference"]["accuracy"]
    assert difference["value"] == pytest.approx(1.0 - document["compare"]["metrics"]["accuracy"])
    assert 0 < difference["low"] <= difference["value"] <= difference["high"]
    assert difference["share_above"] == 1.0
    assert {path.name for path in report.iterdir()} == {
        "confusion.png",
        "reliability.png",
        "report.html",
        "report.json",
    }


def test_a_folder_without_a_task_is_refused_by_name(
    tiny_encoder: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows("rows", film_rows(2))
    assert main(["evaluate", str(tiny_encoder), "--data", str(rows)]) == 2
    assert "has task None" in capsys.readouterr().err
