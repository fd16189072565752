"""Rows on their way through `prepare`: they lie on disk, with a few numbers of each beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.data.digest import id_key, label_key, text_key, text_of, value_key
from fastserve.data.disk_column import DiskColumn
from fastserve.data.disk_rows import DiskRows, RowWriter
from fastserve.data.minhash import band_keys, choose_bands, shingles, signature
from fastserve.data.row import Row
from fastserve.data.split import SplitOptions, group_key, stratum_key, time_of

_Array = np.ndarray[Any, Any]


class Spool:
    """Takes rows one by one; then `rows` reads them and `column` gives a number for each."""

    def __init__(self, folder: Path, task: str, split: SplitOptions, *, near_threshold: float | None) -> None:
        self._folder = folder
        self._writer = RowWriter(folder)
        self._num_bands = 0 if near_threshold is None else choose_bands(near_threshold)
        measures: dict[str, tuple[str, Callable[[Row], float]]] = {"label": ("Q", label_key)}
        if split.stratify:
            measures["stratum"] = ("Q", stratum_key)
        if split.time is not None:
            field = split.time
            measures["time"] = ("d", lambda row: time_of(row, field))
        if split.group is not None:
            group = split.group
            measures["group"] = ("Q", lambda row: group_key(row, group))
        elif task == "question-answering":  # questions about one context belong together
            measures["group"] = ("Q", lambda row: value_key(row["context"]))
        self._measures = {name: measure for name, (_, measure) in measures.items()}
        typecodes = {name: typecode for name, (typecode, _) in measures.items()}
        typecodes |= {"text": "Q", "id": "Q", "split": "B", "file": "L"}
        if self._num_bands:
            typecodes["bands"] = "Q"
        self._columns = {
            name: DiskColumn(folder / f"{name}.column", code) for name, code in typecodes.items()
        }

    def append(self, row: Row, *, split: int, file: int) -> None:
        self._writer.append(row)
        columns = self._columns
        for half in text_key(row):
            columns["text"].append(half)
        columns["id"].append(id_key(row["id"]) if "id" in row else 0)
        columns["split"].append(split)
        columns["file"].append(file)
        for name, measure in self._measures.items():
            columns[name].append(measure(row))
        if self._num_bands:
            for key in band_keys(signature(shingles(text_of(row))), self._num_bands).tolist():
                columns["bands"].append(key)

    def close(self) -> None:
        self._writer.close()

    def rows(self, *, memory_bytes: int) -> DiskRows:
        return DiskRows(self._folder, memory_bytes=memory_bytes)

    def column(self, name: str) -> _Array:
        """A number of each row, mapped: [rows], of `text` [rows, 2], of `bands` [rows, bands]."""
        array = self._columns[name].array()
        return (
            array.reshape(-1, {"text": 2, "bands": self._num_bands}[name])
            if name in ("text", "bands")
            else array
        )

    def has(self, name: str) -> bool:
        return name in self._columns
