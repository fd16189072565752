"""Classes or a number for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fastserve.errors import DataError, OptionError
from fastserve.evaluate.calibration import calibration_error, reliability
from fastserve.evaluate.classification import (
    averages,
    confusion_matrix,
    figures_of_confusion,
    figures_of_sets,
    micro_figures,
)
from fastserve.evaluate.correlation import pearson, spearman
from fastserve.evaluate.task.task import (
    Examples,
    Prediction,
    Row,
    Scores,
    label_config,
    place_of,
    softmax,
)
from fastserve.types import Float32Array, JsonObject

Problem = Literal["single-label", "multi-label", "regression"]

CLASS_METRICS = (
    "accuracy",
    "f1",
    "f1_macro",
    "f1_weighted",
    "precision_macro",
    "recall_macro",
    "calibration_error",
    "loss",
)
_METRICS: dict[Problem, tuple[str, ...]] = {
    "single-label": CLASS_METRICS,
    "multi-label": (
        "f1_micro",
        "f1",
        "f1_macro",
        "f1_weighted",
        "precision_micro",
        "recall_micro",
        "precision_macro",
        "recall_macro",
        "accuracy",
        "loss",
    ),
    "regression": ("spearman", "pearson", "rmse", "mae", "loss"),
}
_PROBLEM_TYPES: dict[Problem, str] = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
_THRESHOLD = 0.5  # from which probability on a text has one of several labels


@dataclass(frozen=True, slots=True, kw_only=True)
class TextClassification:
    """`{"text", "label"}`, with `labels` a list where a text may have several, with a number as `label` for
    regression, and with `text_pair` where it is about two texts.

    `f1` is the macro average.
    """

    labels: tuple[str, ...]
    max_length: int
    problem: Problem = "single-label"
    is_pair: bool = False

    model_class = "ForSequenceClassification"

    @classmethod
    def from_rows(
        cls, rows: Seq[Row], *, max_length: int, is_pair: bool, problem: Problem | None = None
    ) -> TextClassification:
        """The task that training rows pose: their labels in order, and whether they are classes or numbers.

        Raises:
            DataError: rows of several kinds, or of a single class.
        """
        chosen = problem or _problem_of(rows)
        if chosen not in get_args(Problem):
            raise OptionError(
                f"problem={problem!r} is unknown", hint=f"choose one of {', '.join(get_args(Problem))}"
            )
        labels = ("value",) if chosen == "regression" else labels_of_rows(rows)
        if chosen == "single-label" and len(labels) < 2:
            raise DataError(
                f"all training rows have the label {labels[0] if labels else None!r}",
                hint="a classifier needs rows of at least two labels",
            )
        return cls(labels=labels, max_length=max_length, problem=chosen, is_pair=is_pair)

    @property
    def name(self) -> str:
        return "pair-classification" if self.is_pair else "text-classification"

    @property
    def metrics(self) -> tuple[str, ...]:
        return _METRICS[self.problem]

    def encode(self, rows: Seq[Row], tokenizer: Any, *, with_labels: bool) -> Examples:
        examples = Examples()
        for index, row in enumerate(rows):
            texts = [self.text_of(row)]
            if self.is_pair:
                texts.append(_text(row, "text_pair"))
            encoded = encode_text(tokenizer, texts, self.max_length, examples)
            if with_labels:
                encoded["labels"] = self._target(row)
            examples.add(index, encoded)
        return examples

    def text_of(self, row: Row) -> str:
        return _text(row, "text")

    def decode(self, rows: Seq[Row], examples: Examples, logits: Seq[Float32Array]) -> list[Prediction]:
        return [self._prediction(values) for values in logits]

    def score(self, rows: Seq[Row], predictions: Seq[Prediction]) -> Scores:
        if self.problem == "regression":
            return _score_numbers([float(row["label"]) for row in rows], [p["value"] for p in predictions])
        if self.problem == "multi-label":
            return self._score_sets(rows, predictions)
        return score_classes([str(row["label"]) for row in rows], predictions, self.labels)

    def config(self) -> JsonObject:
        return {**label_config(self.labels), "problem_type": _PROBLEM_TYPES[self.problem]}

    def settings(self) -> JsonObject:
        return {"max_length": self.max_length, "problem": self.problem}

    def _prediction(self, logits: Float32Array) -> Prediction:
        if self.problem == "regression":
            return {"value": float(logits[0])}
        if self.problem == "single-label":
            return class_prediction(logits, self.labels)
        shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
        by_label = dict(zip(self.labels, shares.tolist(), strict=True))
        chosen = [label for label, share in by_label.items() if share >= _THRESHOLD]
        return {"labels": chosen, "probabilities": by_label}

    def _target(self, row: Row) -> Any:
        if self.problem == "regression":
            label = row.get("label")
            if isinstance(label, bool) or not isinstance(label, int | float):
                raise DataError(
                    f"{place_of(row)}: label {label!r} is not a number",
                    hint="regression learns numbers; --problem single-label learns classes",
                )
            return float(label)
        if self.problem == "multi-label":
            present = {self.label_index(row, label) for label in _row_labels(row)}
            return [float(index in present) for index in range(len(self.labels))]
        return self.label_index(row, row.get("label"))

    def label_index(self, row: Row, label: object) -> int:
        """The number of a row's label.

        Raises:
            DataError: no training row has it.
        """
        return label_index(self.labels, row, label)

    def _score_sets(self, rows: Seq[Row], predictions: Seq[Prediction]) -> Scores:
        gold = [frozenset(_row_labels(row)) for row in rows]
        said = [frozenset(prediction["labels"]) for prediction in predictions]
        figures = figures_of_sets(gold, said, self.labels, str)
        metrics = averages(figures, micro=micro_figures(gold, said))
        metrics |= {
            "f1": metrics["f1_macro"],
            "accuracy": float(np.mean([a == b for a, b in zip(gold, said, strict=True)])),
        }
        return Scores(metrics, figures)


def score_classes(gold: Seq[str], predictions: Seq[Prediction], labels: Seq[str]) -> Scores:
    """Accuracy, averages over classes, confusion and calibration of predictions with a `label` each.

    Gold labels that the model does not have count as its mistakes, in a row and column of their own.
    """
    said = [prediction["label"] for prediction in predictions]
    every = tuple(dict.fromkeys([*labels, *sorted(set(gold) - set(labels))]))
    matrix = confusion_matrix(gold, said, every)
    figures = figures_of_confusion(matrix, every)
    is_right = [a == b for a, b in zip(gold, said, strict=True)]
    bins = reliability([max(p["probabilities"].values()) for p in predictions], is_right)
    metrics = {"accuracy": float(np.mean(is_right)), **averages(figures)}
    metrics |= {"f1": metrics["f1_macro"], "calibration_error": calibration_error(bins)}
    return Scores(metrics, figures, every, matrix, tuple(bins))


def class_prediction(logits: Float32Array, labels: Seq[str]) -> Prediction:
    """The likeliest label, its `score`, and the probability of each."""
    shares = softmax(logits)
    best = int(shares.argmax())
    return {
        "label": labels[best],
        "score": float(shares[best]),
        "probabilities": dict(zip(labels, shares.tolist(), strict=True)),
    }


def label_index(labels: tuple[str, ...], row: Row, label: object) -> int:
    """The number of a row's label. Raises DataError where it is none of `labels`."""
    try:
        return labels.index(str(label))
    except ValueError:
        some = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        raise DataError(
            f"{place_of(row)}: label {label!r} is in no training row",
            hint=f"labels are {some}",
        ) from None


def encode_text(tokenizer: Any, texts: Seq[str], max_length: int, examples: Examples) -> dict[str, Any]:
    """One text, or two as a pair, with special tokens, cut to `max_length` tokens, which is counted."""
    encoded = tokenizer(*texts, truncation=False, verbose=False)
    if len(encoded["input_ids"]) > max_length:
        examples.num_cut += 1
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    return dict(encoded)


def _problem_of(rows: Seq[Row]) -> Problem:
    if any("labels" in row for row in rows):
        return "multi-label"
    numbers = [isinstance(row.get("label"), float) for row in rows]
    if any(numbers):
        if not all(isinstance(row.get("label"), float | int) for row in rows):
            wrong = rows[numbers.index(False)]
            raise DataError(
                f"{place_of(wrong)}: label {wrong.get('label')!r} is no number, as others are",
                hint="give numbers alone, or none; --problem says which it is",
            )
        return "regression"
    return "single-label"


def labels_of_rows(rows: Seq[Row]) -> tuple[str, ...]:
    """All labels of training rows: numbers in their order (2 before 10), others by name."""
    found: set[str] = set()
    for row in rows:
        found.update(_row_labels(row))
    return tuple(
        sorted(found, key=lambda label: (not label.isdecimal(), len(label) * label.isdecimal(), label))
    )


def _row_labels(row: Row) -> Iterable[str]:
    if "labels" in row:
        return [str(label) for label in row["labels"]]
    if row.get("label") is None:
        raise DataError(f"{place_of(row)}: the row has no label", hint="give each row a label")
    return [str(row["label"])]


def _text(row: Row, name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str):
        raise DataError(f"{place_of(row)}: {name} is {text!r}, a text was expected")
    return text


def _score_numbers(gold: Seq[float], said: Seq[float]) -> Scores:
    errors = np.asarray(said, np.float64) - np.asarray(gold, np.float64)
    return Scores(
        {
            "spearman": spearman(gold, said),
            "pearson": pearson(gold, said),
            "rmse": float(np.sqrt((errors**2).mean())),
            "mae": float(np.abs(errors).mean()),
        }
    )
