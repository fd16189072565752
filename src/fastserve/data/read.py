"""Rows of files of every format: which reader a file needs, and the rows brought to the fields of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path

from fastserve.data.check import RowChecker
from fastserve.data.field import to_task
from fastserve.data.problem import ProblemLog
from fastserve.data.reader.conll import read_conll
from fastserve.data.reader.json_lines import read_json, read_json_lines
from fastserve.data.reader.marked import FIRST_LINE, read_marked
from fastserve.data.reader.option import ReadOptions
from fastserve.data.reader.parquet import read_parquet
from fastserve.data.reader.table import read_csv, read_tsv
from fastserve.data.reader.text import read_parallel, read_plain
from fastserve.data.row import Row, check_task
from fastserve.data.text_file import open_bytes, uncompressed_name
from fastserve.errors import DataError, OptionError

PathOrPair = str | PathLike[str] | tuple[str | PathLike[str], str | PathLike[str]]
"""A file, or two of parallel text."""

_FORMAT_OF_SUFFIX = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
    **dict.fromkeys((".conll", ".conllu", ".bio", ".iob", ".iob2", ".bioes", ".bmes"), "conll"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text"), "text"),
}


def read_rows(
    path: PathOrPair,
    task: str | None = None,
    *,
    options: ReadOptions | None = None,
    labels: Sequence[str] | None = None,
    log: ProblemLog | None = None,
    checker: RowChecker | None = None,
) -> Iterator[Row]:
    """The rows of a file, one by one, in bounded memory but for JSON documents.

    With a `task`, rows have its fields, and each is checked: a label against `labels`, where they are given.
    A `checker` of your own knows the rows of other files too: all labels are to be of one type.
    What concerns several rows (ids, tag schemes) is for `load_data`. Without a task, rows are as they stand.

    >>> for row in read_rows("train.jsonl", "text-classification"):  # doctest: +SKIP
    ...     print(row.line, row["text"], row["label"])

    Raises:
        DataError: the file is missing, of no known format or broken, or a problem is fatal, which names file
            and line; without a `log` of your own, what is fatal is the default of each kind of problem.
        OptionError: the task or an option is unknown.
        UnsupportedError: the file needs a library that is not installed.
    """
    if task is not None:
        check_task(task)
    options = options or ReadOptions()
    log = log or ProblemLog()
    if task is None:
        yield from read_raw(path, None, options, log)
        return
    checker = checker or RowChecker(task, log, labels)
    for raw in read_raw(path, task, options, log):
        row = checker.check(to_task(raw, task, options, log))
        if row is not None:
            yield row


def read_raw(path: PathOrPair, task: str | None, options: ReadOptions, log: ProblemLog) -> Iterator[Row]:
    """The rows as they stand in the file. Raises as `read_rows`."""
    if isinstance(path, tuple):
        yield from read_parallel(Path(path[0]), Path(path[1]), options, log)
        return
    file = Path(path)
    name = options.format or detect_format(file, task, options)
    if name == "parallel":
        raise OptionError(
            f"parallel text is in two files, and {file} is one",
            hint="give the source and the target, in pairs",
            option="format",
        )
    yield from _READERS[name](file, options, log, task)


def detect_format(path: Path, task: str | None, options: ReadOptions) -> str:
    """The format of a file: by its name, and of plain text by the task.

    Raises:
        DataError: the name tells none.
    """
    name = _FORMAT_OF_SUFFIX.get(Path(uncompressed_name(path)).suffix.lower())
    if name is None:
        raise DataError(
            f"{path}: the name tells no format", hint="name it with --format, such as --format text"
        )
    if name != "text":
        return name
    if task == "token-classification":
        return "conll"
    if task == "relation-extraction" and _is_marked(path):
        return "marked"
    if task in (None, "causal-lm"):
        return "text"
    if options.columns is not None:
        return "tsv"
    if options.label is not None:
        return "text"
    raise DataError(
        f"{path}: plain text does not say where {task} has its fields",
        hint="name the columns that tabs part, such as --columns label,text, or the format with --format",
    )


def _is_marked(path: Path) -> bool:
    with open_bytes(path) as file:
        first = [line for line in islice(file, 10) if line.strip()][:1]
    return any(FIRST_LINE.match(line.decode("latin-1").strip()) for line in first)


_Reader = Callable[[Path, ReadOptions, ProblemLog, str | None], Iterator[Row]]


def _without_task(
    read: Callable[[Path, ReadOptions, ProblemLog], Iterator[Row]],
    path: Path,
    options: ReadOptions,
    log: ProblemLog,
    task: str | None,
) -> Iterator[Row]:
    return read(path, options, log)


def _read_parquet(path: Path, options: ReadOptions, log: ProblemLog, task: str | None) -> Iterator[Row]:
    return read_parquet(path)


_READERS: dict[str, _Reader] = {
    "jsonl": partial(_without_task, read_json_lines),
    "json": partial(_without_task, read_json),
    "squad": partial(_without_task, read_json),
    "csv": read_csv,
    "tsv": read_tsv,
    "conll": partial(_without_task, read_conll),
    "text": partial(_without_task, read_plain),
    "marked": partial(_without_task, read_marked),
    "parquet": _read_parquet,
}
