"""Rows that say what others say: equal, almost equal, of one id, labelled otherwise, in two splits.

Out of core: keys of rows are grouped on disk, rows are read again only where they are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.data.digest import text_of
from fastserve.data.disk_column import DiskColumn
from fastserve.data.disk_rows import DiskRows
from fastserve.data.external_sort import groups_of_equal
from fastserve.data.minhash import shingles, similarity
from fastserve.data.problem import DROP, ERROR, ProblemLog

_Array = np.ndarray[Any, Any]


class DuplicateSearch:
    """Searches the rows of `rows` and leaves out, in `is_kept`, those that the log drops.

    `splits` is the split that each row was given to by its file, uint8 [rows]; of two rows in different
    splits, the one of the lower is left out: train before dev before test.
    """

    def __init__(
        self, rows: DiskRows, splits: _Array, log: ProblemLog, *, memory_bytes: int, folder: Path
    ) -> None:
        self._rows = rows
        self._splits = splits
        self._log = log
        self._memory_bytes = memory_bytes
        self._folder = folder
        self.is_kept = np.ones(len(rows), np.bool_)
        self.is_shared = np.zeros(
            len(rows), np.bool_
        )  # kept, though another kept row says the same, or almost

    def find_equal(self, text_keys: _Array, label_keys: _Array) -> None:
        """Rows with equal texts: duplicates, or contested where their labels differ."""
        contested: dict[int, set[int]] = {}  # by the first of equal rows, the labels that others have
        for index, first in self._later(text_keys):
            label = int(label_keys[index])
            if self._splits[index] != self._splits[first]:
                self._report("split-overlap", index, f"the text is that of {self._place(first)} too")
            elif label == int(label_keys[first]) or label in contested.get(first, ()):
                message = f"the row is that of {self._place(first)} again"
                self.is_shared[[first, index]] |= self._report("duplicate", index, message)
            else:
                message = f"{self._place(first)} labels the same text otherwise"
                if self._report("conflicting-label", index, message):
                    contested.setdefault(first, set()).add(label)
                    self.is_shared[[first, index]] = True

    def find_alike(self, band_keys: _Array, threshold: float) -> None:
        """Rows whose texts are as similar as `threshold`: keys are [rows, bands]."""
        column = DiskColumn(self._folder / "pairs", "Q")
        for band in range(band_keys.shape[1]):
            for group in self._groups(band_keys[:, band]):
                kept = group[self.is_kept[group]]
                for previous, index in pairwise(kept):
                    column.append(int(index) << 32 | int(previous))
                    if previous != kept[0]:
                        column.append(int(index) << 32 | int(kept[0]))
        pairs = column.array()
        pairs.sort()
        for pair in _different(pairs):
            one, other = pair & 0xFFFFFFFF, pair >> 32
            if not (self.is_kept[one] and self.is_kept[other]):
                continue
            if self._splits[one] < self._splits[other]:
                one, other = other, one
            texts = [text_of(self._rows[index]) for index in (one, other)]
            alike = similarity(*map(shingles, texts))
            if alike < threshold or texts[0] == texts[1]:
                continue
            kind = "near-duplicate" if self._splits[one] == self._splits[other] else "split-overlap"
            message = f"{alike:.0%} of the text is that of {self._place(one)}"
            if self._report(kind, other, message) and kind == "near-duplicate":
                self.is_shared[[one, other]] = True

    def find_equal_ids(self, id_keys: _Array, number: Callable[[int, int], None]) -> None:
        """Rows of one id; keys of rows without are 0. Repairs call `number` with the row and its number among
        those of its id, from 2."""
        counts: dict[int, int] = {}
        for index, first in self._later(id_keys):
            if id_keys[index] == 0:
                continue
            message = f"id {self._rows[index]['id']!r} is that of {self._place(first)} too"
            if self._report("duplicate-id", index, message):
                counts[first] = counts.get(first, 1) + 1
                number(index, counts[first])

    def _later(self, keys: _Array) -> Iterator[tuple[int, int]]:
        """Each row whose key another has that counts as their first, and that one, in the order of rows.
        The first is of the highest split; within a split it is the earliest."""
        first_of = np.full(len(keys), -1, np.int64)
        for group in self._groups(keys):
            first = group[np.argmax(self._splits[group])]
            first_of[group] = first
            first_of[first] = -1
        for index in np.flatnonzero(first_of >= 0):
            yield int(index), int(first_of[index])

    def _groups(self, keys: _Array) -> Iterator[_Array]:
        return groups_of_equal(keys, memory_bytes=self._memory_bytes, folder=self._folder)

    def _place(self, index: int) -> str:
        return self._rows[int(index)].place

    def _report(self, kind: str, index: int, message: str) -> bool:
        """Report a row; whether it stays."""
        row = self._rows[int(index)]
        if self._log.report(kind, row.file, row.line, message) in (ERROR, DROP):
            self.is_kept[index] = False
            return False
        return True


def _different(pairs: _Array) -> Iterator[int]:
    """Sorted pairs without repetitions."""
    before = -1
    for pair in pairs:
        if int(pair) != before:
            before = int(pair)
            yield before
