"""Evaluations of models on the same rows, compared."""

from __future__ import annotations

from pathlib import Path

from fastserve.evaluate.task.text_classification import TextClassification
from fastserve.evaluate.task_evaluation import Evaluation, Speed, compare


def test_a_model_is_never_better_than_itself_and_has_less_of_what_is_better_low() -> None:
    rows = [{"text": "a", "label": float(at)} for at in range(20)]
    task = TextClassification(labels=("value",), max_length=8, problem="regression")

    def predicted(error: float) -> Evaluation:
        said = [{"value": row["label"] + error * (1 + at % 3)} for at, row in enumerate(rows)]
        speed = Speed(1.0, 1.0, 1.0)
        return Evaluation(Path("model"), task, "native", 20, task.score(rows, said), speed, said, 20, None)

    same = compare(predicted(1.0), predicted(1.0), rows, resamples=20, seed=0)
    assert {name: found.share_above for name, found in same.items()} == dict.fromkeys(same, 0.0)
    nearer = compare(predicted(1.0), predicted(3.0), rows, resamples=20, seed=0)["mae"]
    assert nearer.low <= nearer.value <= nearer.high < 0
    assert nearer.share_above == 1.0
