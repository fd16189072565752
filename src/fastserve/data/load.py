"""A whole file of rows in memory, checked within and across rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fastserve.data.problem import DROP, ERROR, REPAIR, ProblemLog
from fastserve.data.read import PathOrPair, read_rows
from fastserve.data.reader.option import ReadOptions
from fastserve.data.row import Row
from fastserve.data.tag_repair import TagReader


def load_data(
    path: PathOrPair,
    task: str,
    *,
    options: ReadOptions | None = None,
    labels: Sequence[str] | None = None,
    tag_scheme: str = "iob2",
    tags_in: str | None = None,
    on_problem: Mapping[str, str] | None = None,
    log: ProblemLog | None = None,
) -> list[Row]:
    """Read a file and check its rows: fields, labels, offsets, ids, tags.

    Args:
        path: a file of any format, compressed or not; a pair of files of parallel text.
        task: one of `fastserve.data.TASKS`.
        options: how to read what the file's name and contents do not tell.
        labels: all labels that there may be.
        tag_scheme: the scheme that tags get.
        tags_in: the scheme that tags are in; None tells it from them.
        on_problem: what to do about a kind of problem, {"bad-label": "drop"}; see `PROBLEM_KINDS`.
        log: counts and hands on the problems, and decides about them in place of `on_problem`.

    Returns:
        Rows, which are dicts: {"text": ..., "label": ...} and the like, each with `file` and `line`.

    >>> load_data("train.jsonl", "text-classification")[0]  # doctest: +SKIP
    {'text': 'I am still waiting on my card?', 'label': 'card_arrival'}

    Raises:
        DataError: the file is missing or broken, or a problem is fatal; it names file and line.
        OptionError: the task or an option is unknown.
        UnsupportedError: the file needs a library that is not installed.
    """
    log = log or ProblemLog(on_problem)
    rows: Iterable[Row] = read_rows(path, task, options=options, labels=labels, log=log)
    if task == "token-classification":
        rows = _convert_tags(list(rows), log, tag_scheme, tags_in)
    return list(number_duplicate_ids(rows, log))


def _convert_tags(rows: list[Row], log: ProblemLog, target: str, source: str | None) -> Iterable[Row]:
    reader = TagReader(log, target=target, source=source)
    for row in rows:
        if "tags" in row:
            reader.see(row)
    for row in rows:
        converted = reader.convert(row) if "tags" in row else row
        if converted is not None:
            yield converted


def number_duplicate_ids(rows: Iterable[Row], log: ProblemLog) -> Iterable[Row]:
    """Rows whose `id`, where they have one, no other has: problems where a row had it before."""
    first: dict[object, str] = {}
    for row in rows:
        key = row.get("id")
        if not isinstance(key, str | int):
            yield row
            continue
        if key in first:
            message = f"id {key!r} is that of {first[key]} too"
            action = log.report("duplicate-id", row.file, row.line, message)
            if action in (ERROR, DROP):
                continue
            if action == REPAIR:
                row["id"] = key = free_id(key, first.keys())
        first[key] = row.place
        yield row


def free_id(key: str | int, taken: Iterable[object]) -> str:
    """`key-2`, or the next that is free.

    >>> free_id("q1", {"q1", "q1-2"})
    'q1-3'
    """
    number = 2
    while f"{key}-{number}" in taken:
        number += 1
    return f"{key}-{number}"
