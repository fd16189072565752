"""Splits a completion, as it comes, into text and calls.

It reads character by character, so that the events, joined, do not depend on how the completion was cut. What
looks like a call and is none - broken before its name is known, or of a function that was not offered - is
text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.serve.tools.format import ToolFormat
from fastserve.serve.tools.text_reader import SPACE, NotACallError, Reading, TextReader
from fastserve.serve.tools.tool import Call, Tool

_NAME_KEYS = ("name", "function")
_ARGUMENTS_KEYS = ("arguments", "parameters")
_IGNORED_KEYS = ("type", "id")
_NO_ARGUMENTS = "{}"
_SEPARATORS = SPACE + ",;"  # between calls
_ARGUMENTS_MARK = "[ARGS]"
_ID_MARK = "[CALL_ID]"
_NAME_ENDS = SPACE + "[{"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the text outside of calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the arguments of the call that has begun last."""

    index: int
    text: str


Event = TextDelta | CallStart | ArgumentsDelta


class ToolParser:
    """Of one completion. Space beside calls is left out of the text.

    >>> from fastserve.serve.tools.format import HERMES
    >>> parser = ToolParser(HERMES, [Tool(name="add")])
    >>> parser.feed('<tool_call>{"name": "add", "arguments": {"a"')
    [CallStart(index=0, name='add'), ArgumentsDelta(index=0, text='{"a"')]
    >>> parser.feed(": 1}}</tool_call>")
    [ArgumentsDelta(index=0, text=': 1}')]
    """

    def __init__(self, format_: ToolFormat, tools: Seq[Tool]) -> None:
        self._format = format_
        self._names = frozenset(tool.name for tool in tools)
        self._reader = TextReader()
        self._reading = self._read()
        self._num_calls = 0
        self._events: list[Event] = []
        self._space = ""  # of the text, to be left out beside calls
        self._is_behind_call = False

    @property
    def has_calls(self) -> bool:
        """Whether calls have come so far."""
        return self._num_calls > 0

    def feed(self, text: str) -> list[Event]:
        """The events that are certain after this piece of the completion."""
        self._reader.add(text)
        next(self._reading, None)
        return self._take_events()

    def finish(self) -> list[Event]:
        """The rest, after the last piece."""
        self._reader.close()
        next(self._reading, None)
        if not self.has_calls and self._space:
            self._events.append(TextDelta(self._space))
        return self._take_events()

    def _read(self) -> Reading[None]:
        reader, opening = self._reader, self._format.opening
        if self._format.is_bare:
            first = yield from reader.skip(SPACE)
            self._add_text(reader.raw)
            if first and first in "{[":
                yield from self._read_section()
        while (yield from reader.peek()):
            reader.raw = ""
            if opening is not None and (yield from reader.take_mark(opening)):
                yield from self._read_section()
            else:
                self._add_text(reader.take())

    def _read_section(self) -> Reading[None]:
        """The calls behind an opening."""
        try:
            yield from self._read_calls()
        except NotACallError:
            self._add_text(self._reader.raw)  # since the opening, or the last call
        self._reader.raw = ""

    def _read_calls(self) -> Reading[None]:
        reader = self._reader
        first = yield from reader.skip(SPACE)
        if self._format.is_list and first not in ("[", "{", ""):
            yield from self._read_named_call()
            return
        if is_list := first == "[":
            reader.take()
        num_before = self._num_calls
        while (yield from reader.skip(_SEPARATORS)) == "{":
            yield from self._read_call()
            reader.raw = ""
        if is_list:
            yield from reader.expect("]")
        elif self._num_calls == num_before:
            raise NotACallError
        if self._format.closing is not None:
            yield from reader.skip(SPACE)
            yield from reader.take_mark(self._format.closing)

    def _read_call(self) -> Reading[None]:
        """`{"name": ..., "arguments": {...}}`, in either order. Arguments that are an object are passed on
        as they come, once the name is known; until they are seen to be one this may yet be no call."""
        reader = self._reader
        name, held = None, ""
        has_arguments = False
        yield from reader.expect("{")
        while True:
            key = _load_text((yield from self._read_whole_value()))
            yield from reader.expect(":")
            if key in _NAME_KEYS:
                if name is not None:
                    raise NotACallError
                name = _load_text((yield from self._read_whole_value()))
                if has_arguments:
                    self._start_call(name)
                    self._add_arguments(held)
            elif key in _ARGUMENTS_KEYS:
                if has_arguments:
                    raise NotACallError
                has_arguments = True
                if name is not None and (yield from reader.skip(SPACE)) == "{":
                    self._start_call(name)
                    yield from reader.read_value(self._add_arguments)
                else:
                    held = _to_arguments((yield from self._read_whole_value()))
                    if name is not None:
                        self._start_call(name)
                        self._add_arguments(held)
            elif key in _IGNORED_KEYS:
                yield from self._read_whole_value()
            else:
                raise NotACallError
            if (yield from reader.skip(SPACE)) != ",":
                break
            reader.take()
        yield from reader.expect("}")
        if name is None:
            raise NotACallError
        if not has_arguments:
            self._start_call(name)
            self._add_arguments(_NO_ARGUMENTS)

    def _read_named_call(self) -> Reading[None]:
        """`name[CALL_ID]id[ARGS]{...}`, the id or both marks left out by some."""
        reader = self._reader
        name = yield from self._read_word()
        if (yield from reader.take_mark(_ID_MARK)):
            yield from self._read_word()
        yield from reader.take_mark(_ARGUMENTS_MARK)
        if (yield from reader.skip(SPACE)) != "{":
            raise NotACallError
        self._start_call(name)
        yield from reader.read_value(self._add_arguments)

    def _read_word(self) -> Reading[str]:
        word = ""
        while (character := (yield from self._reader.peek())) and character not in _NAME_ENDS:
            word += self._reader.take()
        return word

    def _read_whole_value(self) -> Reading[str]:
        parts: list[str] = []
        yield from self._reader.skip(SPACE)
        yield from self._reader.read_value(parts.append)
        return "".join(parts)

    def _start_call(self, name: str) -> None:
        if name not in self._names:
            raise NotACallError
        self._space, self._is_behind_call = "", True
        self._events.append(CallStart(self._num_calls, name))
        self._num_calls += 1
        self._reader.raw = ""

    def _add_arguments(self, text: str) -> None:
        self._reader.raw = ""  # whatever follows: this is no text
        if text:
            self._events.append(ArgumentsDelta(self._num_calls - 1, text))

    def _add_text(self, text: str) -> None:
        for character in text:
            if character in SPACE:
                self._space += character
            else:
                self._events.append(TextDelta(character if self._is_behind_call else self._space + character))
                self._space, self._is_behind_call = "", False

    def _take_events(self) -> list[Event]:
        """The events so far, those of a kind that follow each other as one."""
        merged: list[Event] = []
        for event in self._events:
            match merged[-1:], event:
                case [TextDelta(before)], TextDelta(text):
                    merged[-1] = TextDelta(before + text)
                case [ArgumentsDelta(index, before)], ArgumentsDelta(same, text) if index == same:
                    merged[-1] = ArgumentsDelta(index, before + text)
                case _:
                    merged.append(event)
        self._events = []
        return merged


def join_events(events: Seq[Event]) -> tuple[str, list[Call]]:
    """What a completion's events come to: its text, and its calls."""
    texts: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case TextDelta(text):
                texts.append(text)
            case CallStart(_, name):
                names.append(name)
                arguments.append([])
            case ArgumentsDelta(_, text):
                arguments[-1].append(text)  # of the call begun last; indices count those of the whole answer
    calls = [Call(name, "".join(parts)) for name, parts in zip(names, arguments, strict=True)]
    return "".join(texts), calls


def _load_text(text: str) -> str:
    value = _load(text)
    if not isinstance(value, str):
        raise NotACallError
    return value


def _to_arguments(text: str) -> str:
    """Arguments as JSON of an object: as it is, in a text of its own, or null."""
    value = _load(text)
    if value is None:
        return _NO_ARGUMENTS
    if isinstance(value, str):
        text, value = value, _load(value)
    if not isinstance(value, dict):
        raise NotACallError
    return text


def _load(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotACallError from error
