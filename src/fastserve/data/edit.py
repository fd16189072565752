"""Edits of a text that carry places along: where an offset of the text before lies in the text after."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class Edit(NamedTuple):
    """Characters `start` to `end`, which is exclusive, become `text`."""

    start: int
    end: int
    text: str


def apply_edits(text: str, edits: Sequence[Edit]) -> str:
    """The text with all edits, which are in order and do not overlap.

    >>> apply_edits("a<b>c", [Edit(1, 4, " ")])
    'a c'
    """
    pieces = []
    end = 0
    for edit in edits:
        pieces += [text[end : edit.start], edit.text]
        end = edit.end
    return "".join([*pieces, text[end:]])


def move_offset(edits: Sequence[Edit], offset: int, *, is_end: bool) -> int:
    """Where an offset lies after the edits. One that is within an edit goes to its beginning, or, as the end
    of a span, to its end.

    >>> edits = [Edit(1, 4, " ")]
    >>> move_offset(edits, 4, is_end=False), move_offset(edits, 2, is_end=True)
    (2, 2)
    """
    index = bisect_right(edits, offset, key=lambda edit: edit.start)
    shift = sum(len(edit.text) - (edit.end - edit.start) for edit in edits[: max(index - 1, 0)])
    if index == 0:
        return offset
    last = edits[index - 1]
    if offset >= last.end:
        return offset + shift + len(last.text) - (last.end - last.start)
    if offset == last.start:
        return offset + shift
    return last.start + shift + (len(last.text) if is_end else 0)
