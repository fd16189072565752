"""A plain loop on `transformers` learns what `fastserve tune` does: the benchmark, on a tiny model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tune.conftest import city_rows, film_rows

pytest.importorskip("fastserve._native")

BENCH = Path(__file__).resolve().parents[2] / "bench"


def answer_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        name, city = ("Ann", "Bob")[i % 2], ("Paris", "Rome", "Bonn")[i % 3]
        context = f"{name} was in {city} . the film was good"
        answers = {"text": [city], "answer_start": [context.index(city)]}
        rows.append({"context": context, "question": f"where was {name} ?", "answers": answers})
    return rows


CASES = {
    "text-classification": (film_rows, "calibration_error"),
    "token-classification": (city_rows, "f1"),
    "question-answering": (answer_rows, "f1"),
}


@pytest.mark.parametrize("task", CASES)
def test_a_plain_loop_with_the_same_rows_says_the_same(
    task: str, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    bench: Any = importlib.import_module("tune_against_transformers")
    make, metric = CASES[task]
    settings = bench.Settings(
        model=str(tiny_encoder),
        num_train=40,
        num_dev=12,
        epochs=3,
        batch_size=8,
        learning_rate=5e-3,
        max_length=32,
        precision="fp32",
        order="same",
    )
    trial = bench.Trial(task, settings, make(40), make(12), seed=3)
    script, ours = bench.run_script(trial), bench.run_fastserve(trial)
    assert ours.share_alike(script) == 1.0
    assert ours.metrics[metric] == pytest.approx(script.metrics[metric], abs=1e-4)
