"""Server-sent events out of the bytes of a response, however they are cut.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html, of which `data` alone matters here.
"""

from __future__ import annotations


class EventParser:
    """Collects bytes and gives the data of each event once it is complete.

    >>> parser = EventParser()
    >>> parser.feed(b'data: {"a": 1}\\n\\n: still here\\n\\ndata: [DO')
    [b'{"a": 1}']
    >>> parser.feed(b"NE]\\r\\n\\r\\n")
    [b'[DONE]']
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    @property
    def is_within_event(self) -> bool:
        """Whether what came last is the beginning of an event without its end."""
        return bool(self._rest.strip() or self._data)

    def feed(self, received: bytes) -> list[bytes]:
        """The data of the events that these bytes complete; comments and other fields are left out."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                value = line[5:].rstrip(b"\r")
                self._data.append(value[1:] if value.startswith(b" ") else value)
            elif not line.rstrip(b"\r") and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
