"""JSON, one object a line, or one document: an array of rows, or an object that holds arrays of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastserve.data.problem import ProblemLog
from fastserve.data.reader.option import ReadOptions
from fastserve.data.reader.squad import squad_rows
from fastserve.data.row import Row
from fastserve.data.text_file import read_lines, read_text
from fastserve.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_HALF_PAIR_MESSAGE = "half a surrogate pair, which no text has"


def read_json_lines(path: Path, options: ReadOptions, log: ProblemLog) -> Iterator[Row]:
    """A row for each line."""
    for line, text in read_lines(path, log, encoding=options.encoding):
        if not text.strip():
            log.report("empty-row", str(path), line, "an empty line")
            continue
        try:
            value = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            log.report("malformed", str(path), line, f"no JSON: {_reason(error)}")
            continue
        if not isinstance(value, dict):
            log.report("malformed", str(path), line, f"a row is an object, not {_kind(value)}")
        elif "\\u" in text and _has_half_pair(value):
            log.report("malformed", str(path), line, _HALF_PAIR_MESSAGE)
        else:
            yield Row(value, file=str(path), line=line)


def read_json(path: Path, options: ReadOptions, log: ProblemLog) -> Iterator[Row]:
    """The rows of one document; one that goes on after its first value is read as lines."""
    text = read_text(path, log, encoding=options.encoding)
    if _goes_on(text, path):
        yield from read_json_lines(path, options, log)
        return
    line_of = _LineCounter(text)
    is_escaped = "\\u" in text
    try:
        for key, position, value in _elements_of_document(text):
            line = line_of(position)
            if is_escaped and _has_half_pair(value):
                log.report("malformed", str(path), line, _HALF_PAIR_MESSAGE)
                continue
            if isinstance(value, dict) and "paragraphs" in value:
                yield from squad_rows(value, path, text, position, line_of, log)
                continue
            if isinstance(value, list) and options.columns is not None:
                value = dict(zip(options.columns, value, strict=False))
            if not isinstance(value, dict):
                log.report("malformed", str(path), line, f"a row is an object, not {_kind(value)}")
                continue
            if key is not None and options.key_field is not None:
                value = {options.key_field: key, **value}
            yield Row(value, file=str(path), line=line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON: {_reason(error)}", hint="mend the file") from error


class _LineCounter:
    """The line of positions in a text, which are asked for in rising order."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._line = 1

    def __call__(self, position: int) -> int:
        self._line += self._text.count("\n", self._position, position)
        self._position = max(self._position, position)
        return self._line


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _goes_on(text: str, path: Path) -> bool:
    """Whether a value is followed by another: lines of JSON in a file that is called .json."""
    start = _skip_space(text, 0)
    first_end = text.find("\n", start)
    if first_end < 0 or text[start : start + 1] != "{":
        return False
    try:
        _, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        try:
            _DECODER.decode(text[start:first_end])  # the first line is whole: a later one is broken
        except ValueError:
            raise DataError(f"{path}: no JSON: {_reason(error)}", hint="mend the file") from error
        return True
    return _skip_space(text, end) < len(text)


def _elements_of_document(text: str) -> Iterator[tuple[str | None, int, Any]]:
    """The rows of a document: key that they stand under, position, value. Of an object with one array, the
    key says nothing."""
    start = _skip_space(text, 0)
    if text[start : start + 1] == "[":
        yield from ((None, position, value) for position, value in _elements(text, start))
        _DECODER.decode(text[start:])
        return
    members = list(_arrays(text, start))
    if not members:
        raise ValueError("the object holds no array of rows")
    for key, position in members:
        name = key if len(members) > 1 or key not in ("data", "examples", "rows") else None
        yield from ((name, at, value) for at, value in _elements(text, position))


def _elements(text: str, position: int) -> Iterator[tuple[int, Any]]:
    """Position and value of each element of the array that begins at `position`. SNIPS and others nest an
    array of rows in each."""
    position = _skip_space(text, position + 1)
    while text[position : position + 1] not in ("]", ""):
        value, end = _DECODER.raw_decode(text, position)
        yield position, value
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)


def _arrays(text: str, position: int) -> Iterator[tuple[str, int]]:
    """Key and position of each member, of the object that begins at `position`, that is an array."""
    if text[position : position + 1] != "{":
        raise json.JSONDecodeError("Expecting an array or an object", text, position)
    position = _skip_space(text, position + 1)
    while text[position : position + 1] not in ("}", ""):
        key, end = _DECODER.raw_decode(text, position)
        position = _skip_space(text, end)
        if not isinstance(key, str) or text[position : position + 1] != ":":
            raise json.JSONDecodeError("Expecting a name and ':'", text, position)
        position = _skip_space(text, position + 1)
        if text[position : position + 1] == "[":
            yield key, position
        _, end = _DECODER.raw_decode(text, position)
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _has_half_pair(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
