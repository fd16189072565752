"""Whole completions, read by the parser of streams."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.serve.tools.format import ToolFormat
from fastserve.serve.tools.parser import ToolParser, join_events
from fastserve.serve.tools.tool import Call, Tool


def read_calls(text: str, format_: ToolFormat, tools: Sequence[Tool]) -> tuple[str, list[Call]]:
    """The text and the calls of a completion, however it is cut."""
    whole = ToolParser(format_, tools)
    read = join_events([*whole.feed(text), *whole.finish()])
    cut = ToolParser(format_, tools)
    events = [event for character in text for event in cut.feed(character)]
    assert join_events([*events, *cut.finish()]) == read
    return read
