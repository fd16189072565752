"""Chooses one of several texts that go on from, or answer, a text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastserve.errors import DataError
from fastserve.evaluate.calibration import calibration_error, reliability
from fastserve.evaluate.task.task import Examples, Features, Prediction, Row, Scores, place_of, softmax
from fastserve.evaluate.task.text_classification import encode_text
from fastserve.types import Float32Array, JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class MultipleChoice:
    """`{"question" and/or "context", "choices": [...], "label"}`; the label is the index of the right choice,
    or its text. All rows of a run have as many choices."""

    max_length: int

    name = "multiple-choice"
    model_class = "ForMultipleChoice"
    labels = ()
    metrics = ("accuracy", "calibration_error", "loss")

    def encode(self, rows: Seq[Row], tokenizer: Any, *, with_labels: bool) -> Examples:
        examples = Examples()
        num_choices = len(rows[0]["choices"])
        for index, row in enumerate(rows):
            if len(row["choices"]) != num_choices or num_choices < 2:
                raise DataError(
                    f"{place_of(row)}: {len(row['choices'])} choices, the first row has {num_choices}",
                    hint="give each row as many choices, two at least",
                )
            asked = " ".join(row[name] for name in ("context", "question") if row.get(name))
            encoded = [
                encode_text(tokenizer, [asked, choice], self.max_length, examples)
                for choice in row["choices"]
            ]
            features: Features = {name: [one[name] for one in encoded] for name in encoded[0]}
            if with_labels:
                features["labels"] = right_choice(row)
            examples.add(index, features)
        return examples

    def decode(self, rows: Seq[Row], examples: Examples, logits: Seq[Float32Array]) -> list[Prediction]:
        predictions = []
        for row, values in zip(rows, logits, strict=True):
            shares = softmax(values)
            best = int(shares.argmax())
            predictions.append(
                {
                    "choice": best,
                    "text": row["choices"][best],
                    "score": float(shares[best]),
                    "scores": shares.tolist(),
                }
            )
        return predictions

    def score(self, rows: Seq[Row], predictions: Seq[Prediction]) -> Scores:
        is_right = [p["choice"] == right_choice(row) for row, p in zip(rows, predictions, strict=True)]
        bins = reliability([prediction["score"] for prediction in predictions], is_right)
        metrics = {"accuracy": float(np.mean(is_right)), "calibration_error": calibration_error(bins)}
        return Scores(metrics, bins=tuple(bins))

    def config(self) -> JsonObject:
        return {}

    def settings(self) -> JsonObject:
        return {"max_length": self.max_length}


def right_choice(row: Row) -> int:
    """The index of a row's right choice. Raises DataError where its label is none."""
    label, choices = row.get("label"), row["choices"]
    if isinstance(label, str) and label in choices:
        return int(choices.index(label))
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
        return label
    raise DataError(f"{place_of(row)}: label {label!r} is none of {len(choices)} choices, numbered from 0")
