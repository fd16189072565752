"""A row of data: its fields by name, and the file and line where it was read. What each task needs of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.option import check_choice


class Row(dict[str, Any]):
    """One example: a dict of fields that knows where it was read.

    Equal to any dict of the same fields; `json.dumps` writes it.

    Attributes:
        file: the path it was read from, as it was given; "" for a row that was made in memory.
        line: where it begins in that file, from 1; of a Parquet file, its row.

    >>> row = Row({"text": "Hi", "label": "greeting"}, file="train.jsonl", line=3)
    >>> row.place, row["label"]
    ('train.jsonl:3', 'greeting')
    """

    __slots__ = ("file", "line")

    def __init__(self, fields: Mapping[str, Any] | None = None, *, file: str = "", line: int = 0) -> None:
        super().__init__(fields or {})
        self.file = file
        self.line = line

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.file else f"row {self.line}"

    def with_fields(self, fields: Mapping[str, Any]) -> Row:
        """Other fields, read at the same place."""
        return Row(fields, file=self.file, line=self.line)


FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text-classification": (("text", "label"), ("text", "labels")),
    "pair-classification": (("text", "text_pair", "label"),),
    "token-classification": (("tokens", "tags"), ("text", "entities")),
    "relation-extraction": (("text", "head", "tail", "label"), ("tokens", "head", "tail", "label")),
    "question-answering": (("context", "question", "answers"),),
    "multiple-choice": (("question", "choices", "label"), ("context", "choices", "label")),
    "embedding": (("text", "text_pair"), ("text",)),
    "translation": (("source", "target"),),
    "summarization": (("source", "target"),),
    "dialogue": (("messages",),),
    "causal-lm": (("text",), ("messages",)),
}
"""The fields that a row of each task has: one of the alternatives, which are tried in order."""

TASKS = tuple(FIELDS)

TEXT_FIELDS = ("text", "text_pair", "context", "question", "source", "target")
"""Fields whose value is one text."""


def check_task(task: str) -> None:
    """Raise OptionError unless `task` is one of TASKS."""
    check_choice("task", task, TASKS)


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """Every text of a row, in a fixed order: what lengths, duplicates and vocabularies are about.

    >>> texts_of({"tokens": ["New", "York"], "tags": ["B-LOC", "I-LOC"]})
    ['New York']
    """
    texts = [row[field] for field in TEXT_FIELDS if isinstance(row.get(field), str)]
    if "text" not in row and "tokens" in row:
        texts.append(" ".join(row["tokens"]))
    texts += row.get("choices", ())
    texts += [message["content"] for message in row.get("messages", ())]
    return texts


def labels_of(row: Mapping[str, Any]) -> list[str | int | float]:
    """The labels that a row teaches: its own, or the types of its entities; none for other tasks.

    >>> labels_of({"tokens": ["New", "York"], "tags": ["B-LOC", "I-LOC"]})
    ['LOC']
    """
    if "tags" in row:
        return list(dict.fromkeys(tag[2:] for tag in row["tags"] if tag[1:2] == "-"))
    if "entities" in row:
        return list(dict.fromkeys(entity["label"] for entity in row["entities"]))
    if "labels" in row:
        return list(row["labels"])
    if "label" in row and "choices" not in row:
        return [row["label"]]
    return []


def take_tokens_out(row: Row, indexes: Sequence[int]) -> None:
    """Take tokens out of a row, with their tags; what is told by index moves."""
    gone = set(indexes)
    for name in ("tokens", "tags"):
        if name in row:
            row[name] = [item for index, item in enumerate(row[name]) if index not in gone]
    if "text" in row:
        return
    for name in ("head", "tail"):
        if isinstance(row.get(name), dict):
            moved = {
                end: row[name][end] - sum(index < row[name][end] for index in gone)
                for end in ("start", "end")
            }
            row[name] = {**row[name], **moved}
