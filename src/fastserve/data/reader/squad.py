"""Articles of SQuAD's JSON: paragraphs, each with its questions and their answers (arXiv 1606.05250)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastserve.data.problem import ProblemLog
from fastserve.data.row import Row


def squad_rows(
    article: dict[str, Any],
    path: Path,
    text: str,
    position: int,
    line_of: Callable[[int], int],
    log: ProblemLog,
) -> Iterator[Row]:
    """A row for each question of an article that begins at `position` of the file's `text`.

    `line_of` gives the line of a position. The line of a row is that of its question's id.
    """
    for paragraph in _objects(article, "paragraphs"):
        for question in _objects(paragraph, "qas"):
            position = _find(text, question, position)
            fields = {"id": question.get("id"), "title": article.get("title")}
            if question.get("is_impossible") is not None:
                fields["is_impossible"] = question["is_impossible"]
            fields = {name: value for name, value in fields.items() if value is not None}
            for name, holder in (("context", paragraph), ("question", question), ("answers", question)):
                if name in holder:
                    fields[name] = holder[name]
            yield Row(fields, file=str(path), line=line_of(position))
        if not paragraph.get("qas"):
            log.report("malformed", str(path), line_of(position), "a paragraph without questions")


def _objects(holder: dict[str, Any], name: str) -> list[dict[str, Any]]:
    values = holder.get(name)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _find(text: str, question: dict[str, Any], position: int) -> int:
    """Where the question's id stands, at `position` or later, however its JSON was escaped."""
    for is_ascii in (True, False):
        found = text.find(json.dumps(question.get("id"), ensure_ascii=is_ascii), position)
        if found >= 0:
            return found
    return position
