"""How well classes are predicted: accuracy, precision, recall and F1 by class, micro, macro and weighted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """Of one class: `precision`, `recall` and `f1` of 0 to 1, `support`, how often it is the right one, and
    how often it was predicted.

    A figure whose denominator is 0 is 0, as in scikit-learn.
    """

    precision: float
    recall: float
    f1: float
    support: int
    num_predicted: int

    @classmethod
    def from_counts(cls, num_right: int, num_predicted: int, num_gold: int) -> ClassFigures:
        """From how often the class was predicted rightly, predicted at all, and the right one."""
        precision = num_right / num_predicted if num_predicted else 0.0
        recall = num_right / num_gold if num_gold else 0.0
        f1 = 2 * num_right / (num_predicted + num_gold) if num_predicted + num_gold else 0.0
        return cls(precision, recall, f1, num_gold, num_predicted)

    def to_json(self) -> dict[str, float]:
        return {"precision": self.precision, "recall": self.recall, "f1": self.f1, "support": self.support}


def confusion_matrix(gold: Seq[str], predicted: Seq[str], labels: Seq[str]) -> Counts:
    """How often each label was taken for each: int64 [gold labels, predicted labels], in the order of
    `labels`.

    >>> confusion_matrix(["a", "a", "b"], ["a", "b", "b"], ["a", "b"]).tolist()
    [[1, 1], [0, 1]]
    """
    index = {label: i for i, label in enumerate(labels)}
    pairs = [index[right] * len(labels) + index[said] for right, said in zip(gold, predicted, strict=True)]
    counts = np.bincount(np.array(pairs, np.int64), minlength=len(labels) ** 2)
    return counts.reshape(len(labels), len(labels)).astype(np.int64)


def figures_of_confusion(matrix: Counts, labels: Seq[str]) -> dict[str, ClassFigures]:
    """The figures of each label, from `confusion_matrix`."""
    return {
        label: ClassFigures.from_counts(int(matrix[i, i]), int(matrix[:, i].sum()), int(matrix[i].sum()))
        for i, label in enumerate(labels)
    }


def figures_of_sets(
    gold: Seq[frozenset[Item]],
    predicted: Seq[frozenset[Item]],
    labels: Seq[str],
    label_of: Callable[[Item], str],
) -> dict[str, ClassFigures]:
    """The figures of each label where a row has any number of items, each with a label: the labels of a text,
    the entities in it."""
    counts = {label: [0, 0, 0] for label in labels}
    for right, said in zip(gold, predicted, strict=True):
        for place, items in enumerate((right & said, said, right)):
            for item in items:
                counts.setdefault(label_of(item), [0, 0, 0])[place] += 1
    return {label: ClassFigures.from_counts(*three) for label, three in counts.items()}


def micro_figures(gold: Seq[frozenset[Item]], predicted: Seq[frozenset[Item]]) -> ClassFigures:
    """All items counted alike, whatever their class."""
    num_right = sum(len(right & said) for right, said in zip(gold, predicted, strict=True))
    return ClassFigures.from_counts(num_right, sum(map(len, predicted)), sum(map(len, gold)))


def averages(figures: Mapping[str, ClassFigures], *, micro: ClassFigures | None = None) -> dict[str, float]:
    """`precision_macro`, `recall_macro`, `f1_macro` (plain means over classes), `f1_weighted` (by support),
    and, of `micro`, where it says something else than accuracy, `precision_micro`, `recall_micro`,
    `f1_micro`.

    Classes that are neither right nor predicted anywhere do not count, as in scikit-learn.
    """
    counted = [f for f in figures.values() if f.support or f.num_predicted]
    total = sum(f.support for f in counted)
    result = {
        "precision_macro": _mean([f.precision for f in counted]),
        "recall_macro": _mean([f.recall for f in counted]),
        "f1_macro": _mean([f.f1 for f in counted]),
        "f1_weighted": sum(f.f1 * f.support for f in counted) / total if total else 0.0,
    }
    if micro is not None:
        result |= {
            "precision_micro": micro.precision,
            "recall_micro": micro.recall,
            "f1_micro": micro.f1,
        }
    return result


def _mean(values: Seq[float]) -> float:
    return sum(values) / len(values) if values else 0.0
