"""Rows on disk, any of them at hand in bounded memory: a file of JSON lines, an index of where each begins,
and a cache of those used last."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from fastserve.data.disk_column import DiskColumn
from fastserve.data.row import Row
from fastserve.errors import DataError
from fastserve.option import check_integer

_OBJECT_BYTES = 6  # what a byte of JSON takes as Python objects: measured on rows of text and of tags


class RowWriter:
    """Writes rows into a folder for `DiskRows` to read."""

    def __init__(self, folder: Path) -> None:
        self._data = (folder / "rows.jsonl").open("wb")
        self._starts = DiskColumn(folder / "rows.start", "Q")
        self._files: dict[str, int] = {}
        self._folder = folder

    def append(self, row: Row) -> None:
        self._starts.append(self._data.tell())
        file = self._files.setdefault(row.file, len(self._files))
        line = json.dumps([file, row.line, row], ensure_ascii=False, separators=(",", ":"))
        self._data.write(line.encode() + b"\n")

    def close(self) -> None:
        self._data.close()
        self._starts.array()
        (self._folder / "rows.files").write_text(json.dumps(list(self._files)), encoding="utf-8")


class DiskRows(Sequence[Row]):
    """Rows that lie on disk. Reading one costs a seek and its decoding, unless it was used lately.

    `memory_bytes` bounds what the cache of decoded rows takes, about.

    >>> rows = DiskRows.from_rows(({"text": "a"}, {"text": "b"}), folder)  # doctest: +SKIP
    >>> rows[1], len(rows)  # doctest: +SKIP
    ({'text': 'b'}, 2)
    """

    @classmethod
    def from_rows(
        cls, rows: Iterable[Row], folder: str | os.PathLike[str], *, memory_bytes: int = 2**26
    ) -> DiskRows:
        """Write rows into a folder, which is made, and open them."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        writer = RowWriter(path)
        try:
            for row in rows:
                writer.append(row if isinstance(row, Row) else Row(row))
        finally:
            writer.close()
        return cls(path, memory_bytes=memory_bytes)

    def __init__(self, folder: str | os.PathLike[str], *, memory_bytes: int = 2**26) -> None:
        check_integer("memory_bytes", memory_bytes, low=0, high=2**63 - 1)
        path = Path(folder)
        if not (path / "rows.files").is_file():
            raise DataError(f"no rows are at {path}", hint="write them with DiskRows.from_rows")
        self._files = json.loads((path / "rows.files").read_text(encoding="utf-8"))
        starts = path / "rows.start"
        empty = np.zeros(0, np.uint64)
        self._starts = np.memmap(starts, np.uint64, "r") if starts.stat().st_size else empty
        self._data = (path / "rows.jsonl").open("rb")
        self._memory_bytes = memory_bytes
        self._cached: OrderedDict[int, tuple[Row, int]] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        if index in self._cached:
            self._cached.move_to_end(index)
            return self._cached[index][0]
        self._data.seek(int(self._starts[index]))
        line = self._data.readline()
        row = self._decode(line)
        self._keep(index, row, len(line) * _OBJECT_BYTES)
        return row

    def __iter__(self) -> Iterator[Row]:
        """All rows in order, past the cache."""
        with open(self._data.name, "rb") as file:
            for line in islice(file, len(self)):
                yield self._decode(line)

    def close(self) -> None:
        self._data.close()
        self._cached.clear()

    def __enter__(self) -> DiskRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decode(self, line: bytes) -> Row:
        file, number, fields = json.loads(line)
        return Row(fields, file=self._files[file], line=number)

    def _keep(self, index: int, row: Row, num_bytes: int) -> None:
        if num_bytes > self._memory_bytes:
            return
        self._cached[index] = (row, num_bytes)
        self._cached_bytes += num_bytes
        while self._cached_bytes > self._memory_bytes:
            _, (_, freed) = self._cached.popitem(last=False)
            self._cached_bytes -= freed


def to_json_line(fields: dict[str, Any]) -> bytes:
    """A row as a line of a JSONL file."""
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
