"""Scores of tags that rows and models write in different schemes."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.evaluate.task.token_classification import TokenClassification, entities_of_tags

ROWS = [
    {"tokens": ["Ann", "Lee", "met", "Bob", "."], "tags": ["B-PER", "I-PER", "O", "B-PER", "O"]},
    {"tokens": ["in", "Rome"], "tags": ["O", "B-LOC"]},
]


def said(*rows: list[str], scheme: str) -> list[dict[str, Any]]:
    names = ("first_token", "end_token", "label")
    return [
        {
            "tags": tags,
            "entities": [dict(zip(names, span, strict=True)) for span in entities_of_tags(tags, scheme)],
        }
        for tags in rows
    ]


@pytest.mark.parametrize(
    ("scheme", "labels", "tags"),
    [
        ("iob2", ("B-LOC", "B-PER", "I-PER"), (["B-PER", "I-PER", "O", "B-PER", "O"], ["O", "B-LOC"])),
        ("io", ("LOC", "PER"), (["PER", "PER", "O", "PER", "O"], ["O", "LOC"])),
        ("io", ("I-LOC", "I-PER"), (["I-PER", "I-PER", "O", "I-PER", "O"], ["O", "I-LOC"])),
        (
            "iobes",
            tuple(f"{prefix}-{label}" for prefix in "BIES" for label in ("LOC", "PER")),
            (["B-PER", "E-PER", "O", "S-PER", "O"], ["O", "S-LOC"]),
        ),
    ],
)
def test_a_model_is_right_whatever_scheme_its_labels_are_in(
    scheme: str, labels: tuple[str, ...], tags: tuple[list[str], list[str]]
) -> None:
    task = TokenClassification(labels=("O", *labels), max_length=16)
    scores = task.score(ROWS, said(*tags, scheme=scheme))
    assert (scores.metrics["f1"], scores.metrics["accuracy"]) == (1.0, 1.0)
    assert set(scores.by_label) == {"LOC", "PER"}
    missed = task.score(ROWS, said(tags[0], ["O", "O"], scheme=scheme))
    assert missed.metrics["recall"] == pytest.approx(2 / 3)
    assert missed.metrics["precision"] == 1.0
    assert missed.metrics["accuracy"] == pytest.approx(6 / 7)
