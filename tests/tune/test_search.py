"""Hyper-parameter search: the better of what is tried becomes the output, and a killed search goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastserve.cli.main import main
from fastserve.errors import OptionError, StepError
from fastserve.tune import TuneOptions, TuneResult
from fastserve.tune.search import Range, SearchResult, read_space, search
from tune.conftest import OVERLAP_KEPT, film_rows

WriteRows = Callable[[str, list[dict[str, Any]]], Path]
SHORT = TuneOptions(epochs=4, batch_size=8, device="cpu", max_length=32)


def test_the_best_trial_becomes_the_output_and_an_interrupted_search_goes_on(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows("rows", film_rows(32))
    steps = 0

    def stop_in_third_trial(progress: Any) -> None:
        nonlocal steps
        steps += progress.step == 1 and not progress.figures
        if steps == 3:
            raise InterruptedError

    about = {
        "model": str(tiny_encoder),
        "train": rows,
        "dev": rows,
        "on_problem": OVERLAP_KEPT,
        "output": tmp_path / "out",
    }
    space = {"learning_rate": (1e-7, 5e-3), "weight_decay": Range(0.0, 0.1)}
    with pytest.raises(InterruptedError):
        search(
            "text-classification", **about, space=space, trials=5, options=SHORT, report=stop_in_third_trial
        )
    with pytest.raises(OptionError, match="--resume goes on with it"):
        search("text-classification", **about, space=space, trials=5, options=SHORT)
    result = search("text-classification", **about, space=space, trials=5, options=SHORT, resume=True)
    assert result.num_complete + result.num_pruned == 5
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out.search").exists()
    trials = json.loads((tmp_path / "out" / "search" / "trials.json").read_text("utf-8"))["trials"]
    best = max(trials, key=lambda trial: -1.0 if trial["value"] is None else trial["value"])
    assert result.best.metrics["accuracy"] == best["value"]
    assert result.best_options == best["options"]
    assert [trial["state"] for trial in trials].count("fail") == 1
    assert (tmp_path / "out" / "search" / "trials.png").is_file()


def test_a_space_is_read_with_its_ranges_and_choices(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("learning-rate: {low: 1e-5, high: 1e-3, log: true}\nbatch_size: [8, 16]\nalpha: [1e1]\n")
    assert read_space(path) == {
        "learning_rate": Range(1e-5, 1e-3, log=True),
        "batch_size": (8, 16),
        "alpha": (10.0,),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: [1]", "'rate' is no option that can be searched"),
        ("epochs: {low: 3, high: 2}", "epochs is"),
        ("epochs: [", "is broken"),
        ("batch_size: {low: 1.5, high: 2.5}", "batch_size is"),
        ("learning_rate: {low: 1.0, high: 2.0, step: -0.1}", "learning_rate is"),
        ("learning_rate: {low: 1.0, high: 2.0, step: 0.1, log: true}", "learning_rate is"),
        ("rank: {low: 1, high: 9, step: 0.5}", "rank is"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(OptionError, match=message):
        read_space(path)


def test_what_a_trial_would_be_refused_for_is_said_before_the_first(tmp_path: Path) -> None:
    about = {"model": "none", "train": tmp_path / "no", "dev": tmp_path / "no", "output": tmp_path / "out"}
    space = {"learning_rate": Range(1e-5, 1e-3), "batch_size": (8, 16), "accumulation": (1, 16)}
    with pytest.raises(OptionError, match="batch_size=8, accumulation=16 would be refused: batch_size=8 is"):
        search("text-classification", **about, space=space, trials=2)
    with pytest.raises(OptionError, match="rank=0 would be refused"):
        search("text-classification", **about, space={"rank": Range(0, 8)}, trials=2)
    assert not list(tmp_path.iterdir())


def test_trials_that_diverge_end_and_are_never_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [math.nan, 0.5, math.nan]

    def tune(task: str, *, output: Path, **about: Any) -> TuneResult:
        output.mkdir()
        return TuneResult(output, {"loss": losses.pop(0)}, "loss", None, 1, 0.0, 0, None, {})

    monkeypatch.setattr("fastserve.tune.search.tune", tune)

    def run(output: str) -> SearchResult:
        return search(
            "text-classification",
            model="none",
            train="none",
            dev="none",
            output=tmp_path / output,
            space={"learning_rate": (1e-5, 1.0)},
            trials=3,
            options=TuneOptions(metric="loss"),
        )

    result = run("out")
    assert (result.num_complete, result.num_pruned, result.best.metrics) == (1, 2, {"loss": 0.5})
    losses += [math.nan] * 3
    with pytest.raises(StepError, match="none of 3 trials has a finite loss"):
        run("other")
    assert not losses


def test_trials_without_a_space_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--train", "no", "--output", str(tmp_path / "out")]
    assert main(["tune", "text-classification", "--model", "none", *files, "--trials", "3"]) != 0
    assert "name its space: --search FILE" in capsys.readouterr().err
