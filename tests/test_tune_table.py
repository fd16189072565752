"""The tables of the guide to tuning are what the results say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastserve._native")

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("tune_table")


def test_the_guide_holds_the_tables_of_the_results() -> None:
    subprocess.run([sys.executable, BENCH / "tune_table.py", "--check"], check=True)


def test_a_pair_is_told_by_its_means_in_points(tables: Any) -> None:
    runs = [
        {"seed": seed, "side": side, "metrics": {"accuracy": accuracy}, "cpu_seconds": 60.0}
        for seed in (0, 1)
        for side, accuracy in (("script", 0.98), ("fastserve", 0.99 - 0.01 * seed))
    ]
    for run in runs[1::2]:
        run["share_alike"] = 0.995
    document = {
        "set": "sms",
        "task": "text-classification",
        "metric": "accuracy",
        "settings": {"num_train": 1500, "num_dev": 800, "epochs": 2, "order": "same"},
        "runs": runs,
    }
    line = tables.pair_table({"sms": document}).splitlines()[-1]
    assert line == (
        "| SMS spam | 1,500 x 2, 800 | accuracy | 2 | 98.00 (98.0 to 98.0) | 98.50 (98.0 to 99.0) | +0.50 "
        "| 99.5 % | 60 / 60 | `--sets sms` |"
    )


def test_shares_of_rouge_are_told_in_percent(tables: Any) -> None:
    document = {
        "metric": "rougeL",
        "num_train": 160,
        "num_dev": 50,
        "options": {"epochs": 1},
        "scores": {"first sentence": {"rougeL": 0.2}, "tuned": {"rougeL": 0.25}},
        "best_copy": "first sentence",
        "difference": {"value": 0.05, "low": 0.01, "high": 0.09},
        "cpu_seconds": 100.0,
    }
    line = tables.generation_table({"generation-summarization": document}).splitlines()[-1]
    assert "| ROUGE-L | 20.0 (first sentence) | 25.0 | +5.0 (+1.0 to +9.0) | 100 |" in line
