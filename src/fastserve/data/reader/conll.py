"""Columns of tokens and tags, as CoNLL's shared tasks have them: a token a line, a blank line after each
sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fastserve.data.problem import ProblemLog
from fastserve.data.reader.option import ReadOptions
from fastserve.data.row import Row
from fastserve.data.text_file import read_lines
from fastserve.errors import OptionError

_DOCUMENT = "-DOCSTART-"
_METADATA = re.compile(r"# \S+ = ")  # https://universaldependencies.org/format.html


def read_conll(path: Path, options: ReadOptions, log: ProblemLog) -> Iterator[Row]:
    """A row for each sentence: the first column are its tokens, the last its tags, unless `columns` names
    which are `token` and `tag`. Rows after a -DOCSTART- line have a `document`, counted from 1.

    Raises:
        OptionError: `columns` names no `token` or no `tag`.
    """
    token_column, tag_column, num_columns = _places(options)
    tokens: list[str] = []
    tags: list[str] = []
    start = document = last_line = 0
    is_whole = True

    def sentence() -> Iterator[Row]:
        if tokens and is_whole:
            fields: dict[str, object] = {"tokens": [*tokens], "tags": [*tags]}
            if document:
                fields["document"] = document
            yield Row(fields, file=str(path), line=start)
        tokens.clear()
        tags.clear()

    for line, text in read_lines(path, log, encoding=options.encoding):
        if line > last_line + 1:  # what is between was left out, because of its bytes
            is_whole = False
        last_line = line
        if not text.strip():
            yield from sentence()
            is_whole = True
            continue
        if text.startswith(_DOCUMENT):
            yield from sentence()
            document += 1
            continue
        if not tokens and _METADATA.match(text):
            continue
        cells = text.split("\t") if "\t" in text else text.split()
        num_columns = num_columns or len(cells)
        if len(cells) != num_columns or len(cells) < 2 or not cells[token_column].strip():
            expected = f"{num_columns} columns are" if num_columns > 1 else "a token and its tag should be"
            log.report("malformed", str(path), line, f"{len(cells)} columns where {expected}: {text[:40]!r}")
            is_whole = False
            continue
        start = start if tokens else line
        tokens.append(cells[token_column].strip())
        tags.append(cells[tag_column].strip())
    yield from sentence()


def _places(options: ReadOptions) -> tuple[int, int, int]:
    """Which column has tokens, which tags, and how many there are; 0 where the first line tells."""
    if options.columns is None:
        return 0, -1, 0
    for name in ("token", "tag"):
        if options.columns.count(name) != 1:
            raise OptionError(
                f"columns={','.join(options.columns)} has no {name!r}, or several",
                hint="such as --columns token,-,-,tag",
                option="columns",
            )
    return options.columns.index("token"), options.columns.index("tag"), len(options.columns)
