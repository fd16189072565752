"""Comma- or tab-separated values, with a header or with columns that are named."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastserve.data.field import known_names
from fastserve.data.problem import ProblemLog
from fastserve.data.reader.option import SKIPPED, ReadOptions
from fastserve.data.row import Row
from fastserve.data.text_file import read_lines
from fastserve.errors import DataError

_MAX_CELL_CHARACTERS = 2**30


def read_csv(path: Path, options: ReadOptions, log: ProblemLog, task: str | None) -> Iterator[Row]:
    """A row for each record; cells in quotes may hold commas and line ends (RFC 4180). A record goes as a
    whole where a line of it goes for its bytes."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)  # the module's own limit is 131072, for the whole process
    line = 1
    left_out: set[int] = set()

    def lines() -> Iterator[str]:
        for number, text in read_lines(path, log, encoding=options.encoding, left_out=left_out):
            nonlocal line
            line = number
            yield text + "\n"

    def records() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(lines(), strict=True)
        start = 1
        try:
            for record in reader:
                if not left_out:
                    yield start, record
                left_out.clear()
                start = line + 1
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}: no CSV: {error}", hint="mend the quotes of the record that begins there"
            ) from error

    yield from _rows(path, records(), options, log, task)


def read_tsv(path: Path, options: ReadOptions, log: ProblemLog, task: str | None) -> Iterator[Row]:
    """A row for each line; quotes are text, as no cell can hold a tab or a line end."""
    lines = read_lines(path, log, encoding=options.encoding)
    records = ((line, text.split("\t") if text else []) for line, text in lines)
    yield from _rows(path, records, options, log, task)


def _rows(
    path: Path,
    records: Iterator[tuple[int, list[str]]],
    options: ReadOptions,
    log: ProblemLog,
    task: str | None,
) -> Iterator[Row]:
    columns = options.columns
    is_first = True
    for line, cells in records:
        if not any(cell.strip() for cell in cells):
            log.report("empty-row", str(path), line, "an empty line")
            continue
        if is_first:
            is_first = False
            if columns is None:
                columns = _header(path, line, cells, options, task)
                continue
            if [cell.strip() for cell in cells] == list(columns):
                continue
        assert columns is not None
        if len(cells) != len(columns):
            message = f"{len(cells)} cells where {len(columns)} columns are"
            log.report("malformed", str(path), line, message)
            continue
        yield Row(_fields(columns, cells), file=str(path), line=line)


def _header(
    path: Path, line: int, cells: Sequence[str], options: ReadOptions, task: str | None
) -> tuple[str, ...]:
    """The columns that the first line names.

    Raises:
        DataError: it names none that the task or the options know, so that it may well be a row.
    """
    names = tuple(cell.strip() for cell in cells)
    known = known_names(task) | set(options.fields.values())
    if not known & set(names):
        raise DataError(
            f"{path}:{line}: the first line names no known column: {', '.join(names)[:80]!r}",
            hint="name the columns (--columns label,text), or a field of the header (--field label=NAME)",
        )
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}:{line}: the header names {repeated[0]!r} twice", hint="mend the header")
    return names


def _fields(columns: Sequence[str], cells: Sequence[str]) -> dict[str, object]:
    """Cells by column; those of a name that occurs twice are a list."""
    fields: dict[str, object] = {}
    for name, cell in zip(columns, cells, strict=True):
        if name == SKIPPED:
            continue
        if columns.count(name) > 1:
            values = fields.setdefault(name, [])
            assert isinstance(values, list)
            values.append(cell)
        else:
            fields[name] = cell
    return fields
