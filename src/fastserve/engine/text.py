"""The text of one completion as its tokens arrive.

Only whole characters come out, and nothing that may yet turn out to be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """Turns tokens into text one by one, holding back bytes that do not yet make a character."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        ...

    def finish(self) -> str:
        """What is still held back, incomplete characters replaced."""
        ...


class MakeDecoder(Protocol):
    """Gives a fresh decoder; it may leave out tokens that are no text."""

    def __call__(self, *, skip_special_tokens: bool) -> TokenDecoder: ...


class CompletionText:
    """Decodes tokens and cuts at the first stop string.

    Text is cut at the stop string that is complete first when read character by character (of those that end
    together, the longest), so that the result does not depend on where tokens begin and end.
    """

    def __init__(
        self, decoder: TokenDecoder, stop: Sequence[str] = (), *, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._decoder = decoder
        for token_id in prompt_ids:  # the completion goes on where they end: its first word keeps its space
            decoder.push(token_id)
        self._stop = tuple(stop)
        self._held = ""  # could be the beginning of a stop string
        self.stop_string: str | None = None  # the one that has ended it

    @property
    def has_stopped(self) -> bool:
        return self.stop_string is not None

    def push(self, token_id: int) -> str:
        """The text that is certain after this token. Sets `stop_string` where one is complete."""
        return self._take(self._decoder.push(token_id))

    def finish(self) -> str:
        """The rest of the text; call once, after the last token."""
        if self.has_stopped:
            return ""
        certain = self._take(self._decoder.finish())
        held, self._held = self._held, ""
        return certain + held

    def _take(self, text: str) -> str:
        if not self._stop:
            return text
        assert not self.has_stopped, "no text follows a stop string"
        text = self._held + text
        if found := _find_first(text, self._stop):
            start, self.stop_string = found
            self._held = ""
            return text[:start]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        certain = len(text) - num_held
        self._held = text[certain:]
        return text[:certain]


def _find_first(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """The stop string that ends first in text, after where it begins; None where there is none."""
    found = [(start + len(s), start, s) for s in stop if (start := text.find(s)) >= 0]
    return min(found)[1:] if found else None


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of text that is a beginning of stop, shorter than stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
