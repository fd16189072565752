"""The data card: what a prepared set holds, how it came about, and what was wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.data.clean import text_length
from fastserve.data.disk_column import DiskColumn
from fastserve.data.problem import PROBLEM_KINDS, Problem
from fastserve.data.row import Row
from fastserve.data.tag_scheme import read_spans

_QUANTILES = {"least": 0, "median": 0.5, "p90": 0.9, "p99": 0.99, "most": 1}
_EXAMPLES = 3


class SplitStatistics:
    """Counts of the rows of one split, gathered one by one, lengths on disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self.num_rows = 0
        self.num_augmented = 0
        self.labels: Counter[str | int] = Counter()
        self.num_regression = 0
        self._lengths = DiskColumn(folder / f"{name}.length", "Q")
        self._columns: dict[str, DiskColumn] = {}
        self._folder, self._name = folder, name

    def add(self, row: Row) -> None:
        self.num_rows += 1
        self.num_augmented += "augmented" in row
        self._lengths.append(text_length(row))
        for unit in ("tokens", "messages", "choices"):
            if unit in row:
                if unit not in self._columns:
                    path = self._folder / f"{self._name}.{unit}.length"
                    self._columns[unit] = DiskColumn(path, "Q")
                self._columns[unit].append(len(row[unit]))
        if isinstance(row.get("label"), float):
            self.num_regression += 1
        else:
            self.labels.update(self._labels(row))

    def summary(self) -> dict[str, Any]:
        """As a document: rows, lengths by unit, labels by number."""
        lengths = {"characters": quantiles(self._lengths.array())}
        lengths |= {unit: quantiles(column.array()) for unit, column in self._columns.items()}
        document: dict[str, Any] = {"rows": self.num_rows, "lengths": lengths}
        if self.num_augmented:
            document["augmented"] = self.num_augmented
        if self.labels:
            document["labels"] = dict(self.labels.most_common())
            document["imbalance"] = round(max(self.labels.values()) / min(self.labels.values()), 1)
        return document

    def _labels(self, row: Row) -> list[str | int]:
        if "tags" in row:
            return [span.label for span in read_spans(row["tags"])]
        if "entities" in row:
            return [entity["label"] for entity in row["entities"]]
        if "answers" in row:
            return ["answered" if row["answers"]["text"] else "unanswerable"]
        if "labels" in row:
            return list(row["labels"])
        return [row["label"]] if "label" in row else []


def quantiles(lengths: np.ndarray[Any, Any]) -> dict[str, int]:
    """Least, median, 90th and 99th percentile, most, of [rows]; none of no rows."""
    if not len(lengths):
        return {}
    values = np.quantile(lengths, list(_QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(_QUANTILES, values, strict=True)}


@dataclass(slots=True)
class ProblemExamples:
    """The first problems of each kind."""

    examples: dict[str, list[Problem]] = field(default_factory=dict)

    def add(self, problem: Problem) -> None:
        kept = self.examples.setdefault(problem.kind, [])
        if len(kept) < _EXAMPLES:
            kept.append(problem)


@dataclass(frozen=True, slots=True)
class DataCard:
    """What a prepared set is made of. `splits` are the summaries of `SplitStatistics` by split."""

    task: str
    sources: Sequence[Mapping[str, Any]]
    splits: Mapping[str, Mapping[str, Any]]
    problems: Mapping[str, Mapping[str, int]]
    examples: Mapping[str, Sequence[Problem]]
    cleaned: Mapping[str, int]
    notes: Mapping[str, int]
    options: Mapping[str, Any]
    outputs: Mapping[str, str]

    def to_document(self) -> dict[str, Any]:
        """The card as JSON has it."""
        names = ("task", "sources", "splits", "problems", "cleaned", "notes", "options", "outputs")
        return {name: _plain(getattr(self, name)) for name in names}

    def to_text(self) -> str:
        """The card as plain text."""
        lines = [f"Data card: {self.task}", ""]
        for title, header, rows in self.tables():
            lines += [title, *_aligned([header, *rows]), ""]
        return "\n".join(lines)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of each table of the card that is not empty."""
        tables = [
            (
                "Sources",
                ["file", "rows", "bytes", "sha256"],
                [_source_row(source) for source in self.sources],
            ),
            ("Splits", ["split", "rows", "augmented", "imbalance"], self._split_rows()),
            ("Lengths", ["split", "unit", *_QUANTILES], self._length_rows()),
            ("Labels", ["label", *self.splits, "share of train"], self._label_rows()),
            ("Problems", ["kind", "found", "done", "meaning"], self._problem_rows()),
            ("Examples of problems", ["place", "kind", "message"], self._example_rows()),
            ("Cleaned", ["what", "texts"], [[name, str(number)] for name, number in self.cleaned.items()]),
            ("Notes", ["note", "rows"], [[text, str(number)] for text, number in self.notes.items()]),
            ("Options", ["option", "value"], [[name, str(value)] for name, value in self.options.items()]),
            ("Written", ["file", "what"], [[name, what] for name, what in self.outputs.items()]),
        ]
        return [table for table in tables if table[2]]

    def _split_rows(self) -> list[list[str]]:
        return [
            [name, str(split["rows"]), str(split.get("augmented", 0)), str(split.get("imbalance", ""))]
            for name, split in self.splits.items()
        ]

    def _length_rows(self) -> list[list[str]]:
        return [
            [name, unit, *map(str, values.values())]
            for name, split in self.splits.items()
            for unit, values in split["lengths"].items()
            if values
        ]

    def _label_rows(self) -> list[list[str]]:
        counts = [split.get("labels", {}) for split in self.splits.values()]
        total = sum(counts[0].values()) if counts else 0
        names = dict.fromkeys(name for labels in counts for name in labels)
        return [
            [
                str(name),
                *(str(labels.get(name, 0)) for labels in counts),
                f"{counts[0].get(name, 0) / total:.1%}" if total else "",
            ]
            for name in names
        ]

    def _problem_rows(self) -> list[list[str]]:
        return [
            [
                kind,
                str(sum(actions.values())),
                ", ".join(f"{action} {number}" for action, number in actions.items()),
                PROBLEM_KINDS[kind].meaning,
            ]
            for kind, actions in self.problems.items()
        ]

    def _example_rows(self) -> list[list[str]]:
        return [
            [problem.place, problem.kind, problem.message]
            for problems in self.examples.values()
            for problem in problems
        ]


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _source_row(source: Mapping[str, Any]) -> list[str]:
    return [str(source["file"]), str(source["rows"]), str(source["bytes"]), source["sha256"][:16]]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
