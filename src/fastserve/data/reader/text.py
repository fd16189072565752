"""Plain text by lines, paragraphs or documents, and text that lies line by line beside its translation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastserve.data.problem import ProblemLog
from fastserve.data.reader.option import ReadOptions
from fastserve.data.row import Row
from fastserve.data.text_file import read_lines


def read_plain(path: Path, options: ReadOptions, log: ProblemLog) -> Iterator[Row]:
    """A row for each line, paragraph, or for the file. Blank lines part rows and are none themselves."""
    lines = read_lines(path, log, encoding=options.encoding)
    if options.unit == "line":
        for line, text in lines:
            if text.strip():
                yield Row({"text": text}, file=str(path), line=line)
        return
    kept: list[str] = []
    start = 0
    for line, text in lines:
        if text.strip():
            start = start or line
            kept.append(text)
        elif options.unit == "document":
            kept.append(text)
        elif kept:
            yield Row({"text": "\n".join(kept)}, file=str(path), line=start)
            kept, start = [], 0
    if start:
        yield Row({"text": "\n".join(kept).strip("\n")}, file=str(path), line=start)


def read_parallel(source: Path, target: Path, options: ReadOptions, log: ProblemLog) -> Iterator[Row]:
    """A row for each line of two files: {"source", "target"}. A file that ends before the other is a problem;
    what the other goes on with is left out."""
    ones = read_lines(source, log, encoding=options.encoding)
    others = read_lines(target, log, encoding=options.encoding)
    one, other = next(ones, None), next(others, None)
    while one is not None and other is not None:
        if one[0] == other[0]:
            yield Row({"source": one[1], "target": other[1]}, file=str(source), line=one[0])
            one, other = next(ones, None), next(others, None)
        elif one[0] < other[0]:  # the line beside it was left out, because of its bytes
            one = next(ones, None)
        else:
            other = next(others, None)
    if (rest := one or other) is not None:
        present, absent = (source, target) if one else (target, source)
        message = f"the file ends before this line, {present} goes on"
        log.report("length-mismatch", str(absent), rest[0], message)
