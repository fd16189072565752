"""The relation between two entities of a text, which are marked in it (Baldini Soares et al. 2019,
arXiv 1906.03158)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from fastserve.engine.task.classification import MARKERS, mark
from fastserve.engine.task.row import relation_of
from fastserve.errors import DataError, OptionError
from fastserve.evaluate.task.task import Examples, Prediction, Row, Scores, label_config, place_of
from fastserve.evaluate.task.text_classification import (
    CLASS_METRICS,
    class_prediction,
    encode_text,
    label_index,
    labels_of_rows,
    score_classes,
)
from fastserve.types import Float32Array, JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationExtraction:
    """`{"text" or "tokens", "head": {"start", "end"}, "tail": {...}, "label"}`, with offsets in characters of
    a text, or in tokens.

    `markers` stand around head and tail, and are tokens of their own.
    """

    labels: tuple[str, ...]
    max_length: int
    markers: tuple[str, str, str, str] = MARKERS

    name = "relation-extraction"
    model_class = "ForSequenceClassification"
    metrics = ("f1", *(name for name in CLASS_METRICS if name != "f1"))

    @classmethod
    def from_rows(cls, rows: Seq[Row], *, max_length: int) -> RelationExtraction:
        """The task that training rows pose. Raises DataError where a row has no label."""
        return cls(labels=labels_of_rows(rows), max_length=max_length)

    def encode(self, rows: Seq[Row], tokenizer: Any, *, with_labels: bool) -> Examples:
        examples = Examples()
        for index, row in enumerate(rows):
            features = encode_text(tokenizer, [mark_entities(row, self.markers)], self.max_length, examples)
            if with_labels:
                features["labels"] = label_index(self.labels, row, row.get("label"))
            examples.add(index, features)
        return examples

    def decode(self, rows: Seq[Row], examples: Examples, logits: Seq[Float32Array]) -> list[Prediction]:
        return [class_prediction(values, self.labels) for values in logits]

    def score(self, rows: Seq[Row], predictions: Seq[Prediction]) -> Scores:
        return score_classes([str(row["label"]) for row in rows], predictions, self.labels)

    def config(self) -> JsonObject:
        return {**label_config(self.labels), "problem_type": "single_label_classification"}

    def settings(self) -> JsonObject:
        return {"max_length": self.max_length, "markers": list(self.markers)}


def mark_entities(row: Row, markers: Seq[str]) -> str:
    """The text of a row with markers around its head and tail, which may come in either order.

    >>> head, tail = {"start": 0, "end": 1}, {"start": 2, "end": 3}
    >>> mark_entities({"tokens": ["Ada", "of", "London"], "head": head, "tail": tail}, MARKERS)
    '[E1] Ada [/E1] of [E2] London [/E2]'

    Raises:
        DataError: an entity is not within the text, or both overlap.
    """
    try:
        return mark(*relation_of(row), markers)
    except OptionError as error:
        raise DataError(f"{place_of(row)}: {error.message}", hint=error.hint) from error
