"""The events of OpenAI's older APIs, chat completions and completions: each has one choice, the last the
usage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.serve.generation import Usage
from fastserve.serve.stream import event, to_json_text


class ChoiceStream:
    """Of one request; what all its events have in common is written once.

    >>> ChoiceStream({"id": "1"}, has_usage=False).choice('{"index":0}')
    'data: {"id":"1","choices":[{"index":0}]}\\n\\n'

    Args:
        head: fields of every event.
        has_usage: end with an event of the tokens used; in the others `usage` is null then.
    """

    def __init__(self, head: Mapping[str, Any], *, has_usage: bool) -> None:
        self._start = f'data: {to_json_text(head)[:-1]},"choices":['
        self._end = '],"usage":null}\n\n' if has_usage else "]}\n\n"
        self._has_usage = has_usage

    def choice(self, choice: str) -> str:
        """The event of a choice, which is JSON."""
        return f"{self._start}{choice}{self._end}"

    def end(self, usage: Usage) -> bytes:
        """After the last choice."""
        done = event("[DONE]")
        if not self._has_usage:
            return done
        return f'{self._start}],"usage":{to_json_text(usage.to_json())}}}\n\n'.encode() + done
