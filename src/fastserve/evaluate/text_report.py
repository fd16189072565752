"""`classification_report`: figures by label as text, of tag sequences or of plain labels."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from fastserve.engine.task.token_classification import entities_of_tags
from fastserve.errors import DataError
from fastserve.evaluate.classification import (
    ClassFigures,
    averages,
    confusion_matrix,
    figures_of_confusion,
    figures_of_sets,
    micro_figures,
)

_AVERAGES = ("micro avg", "macro avg", "weighted avg")


def classification_report(
    y_true: Seq[str] | Seq[Seq[str]],
    y_pred: Seq[str] | Seq[Seq[str]],
    *,
    digits: int = 2,
    output_dict: bool = False,
) -> Any:
    """Precision, recall, F1 and support of each label, and their averages.

    Of nested lists, a list of tags for each sentence (`B-PER`, `I-PER`, `O`, ...), whole entities count, as
    in seqeval; of flat lists labels do, as in scikit-learn.

    >>> print(classification_report([["B-PER", "O", "B-LOC"]], [["B-PER", "O", "O"]]))
                  precision    recall  f1-score   support
    <BLANKLINE>
             LOC       0.00      0.00      0.00         1
             PER       1.00      1.00      1.00         1
    <BLANKLINE>
       micro avg       1.00      0.50      0.67         2
       macro avg       0.50      0.50      0.50         2
    weighted avg       0.50      0.50      0.50         2
    <BLANKLINE>

    Args:
        output_dict: give figures by label, and then by average, instead of text.

    Raises:
        DataError: both are not of one length, or a sentence has not as many tags in both.
    """
    if len(y_true) != len(y_pred):
        raise DataError(f"there are {len(y_pred)} predictions for {len(y_true)} rows")
    is_nested = any(not isinstance(row, str) for row in y_true)
    figures, micro = _entity_figures(y_true, y_pred) if is_nested else _label_figures(y_true, y_pred)
    support = sum(one.support for one in figures.values())
    means = averages(figures)
    weighted = {
        name: sum(getattr(one, name) * one.support for one in figures.values()) / max(support, 1)
        for name in ("precision", "recall", "f1")
    }
    lines: dict[str, tuple[float, float, float, int]] = {
        label: (one.precision, one.recall, one.f1, one.support) for label, one in figures.items()
    }
    lines |= {
        "micro avg": (micro.precision, micro.recall, micro.f1, support),
        "macro avg": (means["precision_macro"], means["recall_macro"], means["f1_macro"], support),
        "weighted avg": (weighted["precision"], weighted["recall"], weighted["f1"], support),
    }
    if output_dict:
        names = ("precision", "recall", "f1-score", "support")
        return {label: dict(zip(names, line, strict=True)) for label, line in lines.items()}
    return _text(lines, digits)


def _entity_figures(y_true: Seq[Any], y_pred: Seq[Any]) -> tuple[dict[str, ClassFigures], ClassFigures]:
    for number, (right, said) in enumerate(zip(y_true, y_pred, strict=True)):
        if len(right) != len(said):
            raise DataError(f"sentence {number} has {len(right)} tags, and {len(said)} predicted ones")
    gold, found = (
        [frozenset(entities_of_tags([str(tag) for tag in row])) for row in rows] for rows in (y_true, y_pred)
    )
    labels = sorted({span[2] for spans in (*gold, *found) for span in spans})
    figures = figures_of_sets(gold, found, labels, lambda span: span[2])
    return figures, micro_figures(gold, found)


def _label_figures(y_true: Seq[Any], y_pred: Seq[Any]) -> tuple[dict[str, ClassFigures], ClassFigures]:
    gold, said = [str(label) for label in y_true], [str(label) for label in y_pred]
    labels = sorted({*gold, *said})
    figures = figures_of_confusion(confusion_matrix(gold, said, labels), labels)
    num_right = sum(a == b for a, b in zip(gold, said, strict=True))
    return figures, ClassFigures.from_counts(num_right, len(said), len(gold))


def _text(lines: Mapping[str, tuple[float, float, float, int]], digits: int) -> str:
    width = max(len("weighted avg"), *map(len, lines))
    header = "".join(f"{name:>10}" for name in ("precision", "recall", "f1-score", "support"))
    parts = [f"{'':>{width}} {header}", ""]
    for label, (precision, recall, f1, support) in lines.items():
        if label == _AVERAGES[0]:
            parts.append("")
        numbers = "".join(f"{value:>10.{digits}f}" for value in (precision, recall, f1))
        parts.append(f"{label:>{width}} {numbers}{support:>10}")
    return "\n".join([*parts, ""])
