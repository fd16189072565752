"""Reads a text that comes in pieces, by generators that wait where it ends for now."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields where more text is needed to go on

SPACE = " \t\r\n"


class NotACallError(Exception):
    """What was read is no call: it is text."""


class TextReader:
    """A cursor in a text. `raw` is what has been taken since it was last emptied."""

    def __init__(self) -> None:
        self._ahead: deque[str] = deque()
        self._is_whole = False
        self.raw = ""

    def add(self, text: str) -> None:
        self._ahead.extend(text)

    def close(self) -> None:
        """No more will come."""
        self._is_whole = True

    def peek(self) -> Reading[str]:
        """The next character; empty at the end of the text."""
        while not self._ahead and not self._is_whole:
            yield
        return self._ahead[0] if self._ahead else ""

    def take(self) -> str:
        """Go past the character that `peek` has given."""
        character = self._ahead.popleft()
        self.raw += character
        return character

    def take_mark(self, mark: str) -> Reading[bool]:
        """Go past `mark`, if it comes next."""
        taken = ""
        while len(taken) < len(mark):
            if (yield from self.peek()) != mark[len(taken)]:
                self._ahead.extendleft(reversed(taken))
                return False
            taken += self._ahead.popleft()
        self.raw += mark
        return True

    def skip(self, characters: str) -> Reading[str]:
        """Go past any of these characters; gives the one that follows."""
        while (character := (yield from self.peek())) and character in characters:
            self.take()
        return character

    def expect(self, expected: str) -> Reading[None]:
        """Go past a character, behind any space. Raises NotACallError where another comes."""
        if (yield from self.skip(SPACE)) != expected:
            raise NotACallError
        self.take()

    def read_value(self, pass_on: Callable[[str], None]) -> Reading[None]:
        """Go past a JSON value, passing on its characters. What lies between its quotes and brackets is not
        checked.

        Raises:
            NotACallError: no value begins here, or the text ends within it.
        """
        depth, is_text, is_escaped = 0, False, False
        while True:
            character = yield from self.peek()
            if not character:
                raise NotACallError
            if not is_text and not depth and character in SPACE + ",:}]":
                raise NotACallError
            pass_on(self.take())
            if is_text:
                is_text = is_escaped or character != '"'
                is_escaped = character == "\\" and not is_escaped
            elif character == '"':
                is_text = True
            elif character in "{[":
                depth += 1
            elif character in "}]":
                depth -= 1
            elif not depth:  # a number, true, false or null
                while (character := (yield from self.peek())) and character not in SPACE + ",}]":
                    pass_on(self.take())
            if not is_text and not depth:
                return
