"""The relation between two entities of a text, which are marked in it (Baldini Soares et al. 2019,
arXiv 1906.03158)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from fastserve.errors import DataError
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

MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationExtraction:
    """`{"text" or "tokens", "head": {"start", "end"}, "tail": {...}, "label"}`, with offsets in characters of a
    text, or in tokens.

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

    >>> row = {"tokens": ["Ada", "of", "London"], "head": {"start": 0, "end": 1}, "tail": {"start": 2, "end": 3}}
    >>> mark_entities(row, MARKERS)
    '[E1] Ada [/E1] of [E2] London [/E2]'

    Raises:
        DataError: an entity is not within the text, or both overlap.
    """
    text, spans = _text_and_spans(row)
    spans.sort(key=lambda span: span[0])
    if spans[0][1] > spans[1][0]:
        raise DataError(f"{place_of(row)}: head and tail overlap")
    marked, position = "", 0
    for start, end, number in spans:
        before, after = markers[2 * number], markers[2 * number + 1]
        marked += f"{text[position:start]}{before} {text[start:end]} {after}"
        position = end
    return marked + text[position:]


def _text_and_spans(row: Row) -> tuple[str, list[tuple[int, int, int]]]:
    """The text, and start, end in characters, and number of head and tail; tokens are joined by spaces."""
    named = [_span(row, name) for name in ("head", "tail")]
    if "tokens" not in row:
        limit = len(row["text"])
        spans = [(start, end, number) for number, (start, end) in enumerate(named)]
        text = row["text"]
    else:
        tokens, limit = row["tokens"], len(row["tokens"])
        starts = [0]
        for token in tokens:
            starts.append(starts[-1] + len(token) + 1)
        text = " ".join(tokens)
        spans = [
            (starts[min(start, limit)], starts[min(end, limit)] - 1, number)
            for number, (start, end) in enumerate(named)
        ]
    for start, end in named:
        if not 0 <= start < end <= limit:
            raise DataError(f"{place_of(row)}: entity {start}:{end} is not within the text, whose end is {limit}")
    return text, spans


def _span(row: Row, name: str) -> tuple[int, int]:
    span = row.get(name)
    if not isinstance(span, Mapping) or not all(isinstance(span.get(edge), int) for edge in ("start", "end")):
        raise DataError(f"{place_of(row)}: {name} is {span!r}, start and end were expected")
    return span["start"], span["end"]
