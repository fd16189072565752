"""What all tasks have in common, and the values that go between their three stations.

rows ─ encode ─► examples ─ a model ─► logits ─ decode ─► predictions ─ score ─► scores
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from fastserve.evaluate.calibration import ReliabilityBin
from fastserve.evaluate.classification import ClassFigures, Counts
from fastserve.types import Float32Array, JsonObject

Row = Mapping[str, Any]
"""A row as `fastserve.data` reads it: fields by name; its `place` attribute is where it was read."""

Features = dict[str, Any]
"""Inputs of a model by name: lists of whole numbers, of one length; `labels`, what is to be learned."""

Prediction = dict[str, Any]
"""What is predicted for a row, as JSON; `probabilities` by label where there are any."""

IGNORED = -100  # a label that is not learned, as in transformers

# Metrics of which less is better; of all others more is.
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rmse", "mae", "calibration_error"})


@dataclass(slots=True)
class Examples:
    """Encoded rows. A row may have several examples (windows of a long text), in its order.

    Attributes:
        features: of each example.
        row_index: of each example, the row that it is of.
        notes: of each example, what `decode` needs to know of it besides.
        num_cut: rows of which something was cut off, to fit the longest example.
    """

    features: list[Features] = field(default_factory=list)
    row_index: list[int] = field(default_factory=list)
    notes: list[Any] = field(default_factory=list)
    num_cut: int = 0

    def add(self, row_index: int, features: Features, note: Any = None) -> None:
        self.row_index.append(row_index)
        self.features.append(features)
        self.notes.append(note)


@dataclass(frozen=True, slots=True)
class Scores:
    """How good predictions are: `metrics` by name, and what a report shows besides.

    Attributes:
        metrics: each a plain number.
        by_label: figures of each class, where the task has classes.
        labels, confusion: the rows and columns of a confusion matrix [gold, predicted].
        bins: reliability of the probabilities.
    """

    metrics: dict[str, float]
    by_label: dict[str, ClassFigures] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    confusion: Counts | None = None
    bins: tuple[ReliabilityBin, ...] = ()


class Task(Protocol):
    """A task on rows of one form.

    Attributes:
        name: as the command line has it.
        model_class: of transformers, after the family's name: `ForSequenceClassification`.
        labels: classes, in the order of the model's logits; empty where the task has none.
        metrics: names that `score` gives; the first one chooses the best checkpoint unless told otherwise.
    """

    @property
    def name(self) -> str: ...

    @property
    def model_class(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def encode(self, rows: Seq[Row], tokenizer: Any, *, with_labels: bool) -> Examples:
        """Rows as examples, with `labels` where they are to be learned.

        Raises:
            DataError: a row that the task cannot take, named by its place.
        """

    def decode(self, rows: Seq[Row], examples: Examples, logits: Seq[Float32Array]) -> list[Prediction]:
        """A prediction a row, of what the model gave for each example: [labels], or [tokens, labels]."""

    def score(self, rows: Seq[Row], predictions: Seq[Prediction]) -> Scores:
        """Compare predictions with what the rows say."""

    def config(self) -> JsonObject:
        """What `config.json` holds of the task: `id2label`, `problem_type`, ..."""

    def settings(self) -> JsonObject:
        """What `fastserve.json` holds of the task besides its name; `task_of_folder` reads it again."""


def place_of(row: Row) -> str:
    """Where a row was read, for messages: `train.jsonl:3`."""
    return str(getattr(row, "place", "a row"))


def label_config(labels: Seq[str]) -> JsonObject:
    """`id2label` and `label2id` of a config, and their number."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def softmax(logits: Float32Array) -> NDArray[Any]:
    """Probabilities along the last axis, in float64."""
    import numpy as np

    values = logits.astype(np.float64)
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
