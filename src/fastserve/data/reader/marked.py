"""Sentences with <e1> and <e2> around their nominals, the relation below: SemEval-2010 task 8."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fastserve.data.problem import ProblemLog
from fastserve.data.reader.option import ReadOptions
from fastserve.data.row import Row
from fastserve.data.text_file import read_lines

FIRST_LINE = re.compile(r'(\d+)\t"(.*)"\s*$')
_MARK = re.compile(r"</?e[12]>")


def read_marked(path: Path, options: ReadOptions, log: ProblemLog) -> Iterator[Row]:
    """A row for each sentence: {"id", "text", "head", "tail", "label"}, the marks taken out. `head` is e1.

    Blank lines part the sentences; lines after the relation (`Comment: ...`) are left out.
    """
    block: list[str] = []
    start = 0
    for line, text in read_lines(path, log, encoding=options.encoding):
        if text.strip():
            start = start if block else line
            block.append(text.strip())
        elif block:
            yield from _row(path, start, block, log)
            block = []
    if block:
        yield from _row(path, start, block, log)


def _row(path: Path, line: int, block: list[str], log: ProblemLog) -> Iterator[Row]:
    first = FIRST_LINE.match(block[0])
    if first is None or len(block) < 2:
        log.report("malformed", str(path), line, 'no number, tab and sentence in "", with the relation below')
        return
    text, spans = take_marks(first[2])
    if spans.keys() != {"e1", "e2"}:
        log.report("malformed", str(path), line, "the sentence has not one <e1>...</e1> and one <e2>...</e2>")
        return
    fields = {"id": first[1], "text": text, "head": spans["e1"], "tail": spans["e2"], "label": block[1]}
    yield Row(fields, file=str(path), line=line)


def take_marks(marked: str) -> tuple[str, dict[str, dict[str, int]]]:
    """The sentence without its marks, and where those of a pair stood; a mark without its pair has no span.

    >>> take_marks("The <e1>child</e1> in the <e2>cradle</e2>.")
    ('The child in the cradle.', {'e1': {'start': 4, 'end': 9}, 'e2': {'start': 17, 'end': 23}})
    """
    text = ""
    end = 0
    places: dict[str, int] = {}
    spans = {}
    for mark in _MARK.finditer(marked):
        text += marked[end : mark.start()]
        end = mark.end()
        name = mark[0].strip("</>")
        if "/" not in mark[0]:
            places[name] = len(text)
        elif name in places:
            spans[name] = {"start": places[name], "end": len(text)}
    return text + marked[end:], spans
