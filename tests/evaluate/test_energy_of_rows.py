"""What an evaluation consumes, by row and by token, by a made-up folder of powercap."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastserve.engine.energy import EnergyReading, find_counters
from fastserve.evaluate import task_evaluation
from fastserve.evaluate.task_evaluation import evaluate_folder
from fastserve.evaluate.task_report import write_report

ROWS = [{"text": "a fine film", "label": "good"}, {"text": "a bore", "label": "bad"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    domain = tmp_path / "powercap" / "intel-rapl:0"
    domain.mkdir(parents=True)
    (domain / "name").write_text("package-0\n")
    (domain / "max_energy_range_uj").write_text("1000000000\n")
    (domain / "energy_uj").write_text("999000000\n")
    return tmp_path / "powercap"


class FakePredictor:
    """Reads ten tokens a row, while the machine consumes three joules."""

    backend = "native"

    def __init__(self, counter: Path) -> None:
        self._counter = counter
        self.num_tokens = 0

    def predict(self, rows: list[Any]) -> list[dict[str, Any]]:
        self.num_tokens += 10 * len(rows)
        self._counter.write_text("2000000\n")  # the counter has begun anew
        return [{"label": "good", "probabilities": {"bad": 0.2, "good": 0.8}} for _ in rows]

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, powercap: Path) -> None:
    def open_fake(*_: Any, note: Callable[[str], None]) -> FakePredictor:
        return FakePredictor(powercap / "intel-rapl:0" / "energy_uj")

    monkeypatch.setattr(task_evaluation, "open_predictor", open_fake)


@pytest.mark.usefixtures("fake")
def test_joules_are_shared_among_the_rows_and_the_tokens_of_one_prediction(
    folder: Path, powercap: Path, tmp_path: Path
) -> None:
    evaluation = evaluate_folder(folder, ROWS, powercap=powercap)
    document = evaluation.to_json()
    assert document["num_tokens"] == 20  # not those of the rows that are timed alone
    energy = document["energy"]
    assert energy["joules"] == pytest.approx(3.0)
    assert energy["joules_per_row"] == pytest.approx(1.5)
    assert energy["joules_per_token"] == pytest.approx(0.15)
    write_report(tmp_path / "report", evaluation)
    assert "1.5 J a row and 0.15 J a token" in (tmp_path / "report" / "report.html").read_text("utf-8")


@pytest.mark.usefixtures("fake")
def test_a_machine_that_does_not_tell_has_no_energy(folder: Path, tmp_path: Path) -> None:
    assert evaluate_folder(folder, ROWS, powercap=tmp_path / "missing").to_json()["energy"] is None


def test_a_counter_that_goes_away_meanwhile_leaves_nothing_known(powercap: Path) -> None:
    with EnergyReading(find_counters(powercap)) as reading:
        (powercap / "intel-rapl:0" / "energy_uj").unlink()
    assert reading.joules is None
