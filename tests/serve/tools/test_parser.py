from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastserve.serve.tools.format import HERMES, JSON, LLAMA, MISTRAL, ToolFormat
from fastserve.serve.tools.parser import (
    ArgumentsDelta,
    CallStart,
    Event,
    TextDelta,
    ToolParser,
    join_events,
)
from fastserve.serve.tools.tool import Call, Tool
from serve.tools.conftest import read_calls

TOOLS = [Tool(name="add"), Tool(name="math.root")]
FORMATS = [HERMES, LLAMA, MISTRAL, JSON]


# The families' formats


@pytest.mark.parametrize(
    ("format_", "text", "expected"),
    [
        (
            HERMES,
            '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
            ("", [Call("add", '{"a": 1}')]),
        ),
        (
            HERMES,
            'I add. \n<tool_call>{"name": "add", "arguments": {"a": "}\\"</tool_call>"}}</tool_call>\n'
            '<tool_call>{"arguments": {"x": [1, {"y": 2}]}, "name": "math.root"}</tool_call>',
            ("I add.", [Call("add", '{"a": "}\\"</tool_call>"}'), Call("math.root", '{"x": [1, {"y": 2}]}')]),
        ),
        (
            HERMES,  # SmolLM2 writes a list
            '<tool_call>[{"name": "add", "arguments": {"a": 1}}, {"name": "math.root"}]</tool_call>',
            ("", [Call("add", '{"a": 1}'), Call("math.root", "{}")]),
        ),
        (HERMES, "<tool_call>[]</tool_call>", ("", [])),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}', ("", [Call("add", '{"a": 1}')])),
        (
            LLAMA,
            '<|python_tag|>{"type": "function", "name": "add", "parameters": {}}; '
            '{"name": "add", "parameters": {"b": 2}}',
            ("", [Call("add", "{}"), Call("add", '{"b": 2}')]),
        ),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "x1"}, '
            '{"name": "math.root", "arguments": null}]',
            ("", [Call("add", '{"a": 1}'), Call("math.root", "{}")]),
        ),
        (
            MISTRAL,
            'Now: [TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]math.root[CALL_ID]abc[ARGS]{"b": 2}',
            ("Now:", [Call("add", '{"a": 1}'), Call("math.root", '{"b": 2}')]),
        ),
        (JSON, ' [{"name": "add", "arguments": "{\\"a\\": 1}"}]', ("", [Call("add", '{"a": 1}')])),
    ],
)  # fmt: skip
def test_calls_are_read_as_the_family_writes_them(
    format_: ToolFormat, text: str, expected: tuple[str, list[Call]]
) -> None:
    assert read_calls(text, format_, TOOLS) == expected


@pytest.mark.parametrize(
    ("format_", "text"),
    [
        (HERMES, "Plain text.\n"),
        (HERMES, '<tool_call>{"name": "erase", "arguments": {}}</tool_call>'),  # nobody has offered it
        (HERMES, '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
        (HERMES, "2 <tool_cal 3 <tool_call>me</tool_call>"),
        (HERMES, '{"name": "add", "arguments": {}}'),
        (HERMES, '<tool_call>\n{"na'),
        (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": [1], "name": "add"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "arguments": "x y"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "add", "sum": 3}</tool_call>'),
        (LLAMA, '{"answer": 42}'),
        (LLAMA, 'The call is {"name": "add", "parameters": {}}'),
        (LLAMA, "<|python_tag|>print(1)"),
        (MISTRAL, "[TOOL_CALLS]nothing"),
        (MISTRAL, "[TOOL_CALLS]erase[ARGS]{}"),
        (JSON, "[1, 2]"),
        (JSON, '"add"'),
    ],
)
def test_what_is_no_call_is_text_to_the_letter(format_: ToolFormat, text: str) -> None:
    assert read_calls(text, format_, TOOLS) == (text, [])


def test_a_call_that_is_cut_short_keeps_the_arguments_that_have_come() -> None:
    text = 'Well.<tool_call>{"name": "add", "arguments": {"a": [1, 2'
    assert read_calls(text, HERMES, TOOLS) == ("Well.", [Call("add", '{"a": [1, 2')])


def test_text_goes_on_behind_a_call() -> None:
    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>\n Done. '
    assert read_calls(text, HERMES, TOOLS) == ("Done.", [Call("add", "{}")])


# As it comes


def test_arguments_stream_while_they_are_written() -> None:
    parser = ToolParser(HERMES, TOOLS)
    assert parser.feed("Hi <tool") == [TextDelta("Hi")]
    assert parser.feed('_call>{"name": "ad') == []
    assert not parser.has_calls
    assert parser.feed('d", "arguments": {"a"') == [CallStart(0, "add"), ArgumentsDelta(0, '{"a"')]
    assert parser.has_calls
    assert parser.feed(": 1}}</tool_call>") == [ArgumentsDelta(0, ": 1}")]
    assert parser.finish() == []


def test_text_streams_as_far_as_it_is_certain() -> None:
    parser = ToolParser(HERMES, TOOLS)
    assert parser.feed("a <to") == [TextDelta("a")]
    assert parser.feed("day> ") == [TextDelta(" <today>")]
    assert parser.finish() == [TextDelta(" ")]


names = st.sampled_from(["add", "math.root", "erase"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(max_size=5), values, max_size=3)
pieces = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "[CALL_ID]", "\n", " ",
        "; ", ", ", "{", "}", "[", "]", '"', "\\", '"name"', '"arguments"', ":", "null", "add",
        "text", "<", "🙂",
    ]
)  # fmt: skip


@st.composite
def completions(draw: st.DrawFn) -> str:
    """Calls in all formats, broken ones, and what lies between."""
    parts = []
    for _ in range(draw(st.integers(0, 5))):
        call = json.dumps(
            {"name": draw(names), "arguments": draw(arguments)}, ensure_ascii=draw(st.booleans())
        )
        parts.append(
            draw(st.sampled_from([call, f"<tool_call>\n{call}\n</tool_call>", f"[TOOL_CALLS][{call}]"]))
        )
        parts.append("".join(draw(st.lists(pieces, max_size=4))))
    return "".join(parts)


@settings(max_examples=300, deadline=None)
@given(completions() | st.lists(pieces, max_size=30).map("".join), st.data(), st.sampled_from(FORMATS))
@example('<tool_call>{"name": "add"}', None, HERMES)
def test_the_events_joined_are_those_of_the_whole_completion(
    text: str, data: st.DataObject | None, format_: ToolFormat
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=len(text)))) if data else [0, 3, 15]
    parser = ToolParser(format_, TOOLS)
    events: list[Event] = []
    for start, end in pairwise([0, *cuts, len(text)]):
        events += parser.feed(text[start:end])
    events += parser.finish()
    assert join_events(events) == read_calls(text, format_, TOOLS)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["add", "math.root"]), arguments), min_size=1, max_size=3),
    st.booleans(),
)
def test_what_is_written_is_what_is_read(calls: list[tuple[str, dict[str, object]]], is_ascii: bool) -> None:
    texts = [json.dumps({"name": n, "arguments": a}, ensure_ascii=is_ascii) for n, a in calls]
    expected = [Call(n, json.dumps(a, ensure_ascii=is_ascii)) for n, a in calls]
    written = {
        "hermes": "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts),
        "llama": "; ".join(texts),
        "mistral": f"[TOOL_CALLS] [{', '.join(texts)}]",
        "json": f"[{', '.join(texts)}]",
    }
    for format_ in FORMATS:
        assert read_calls(written[format_.name], format_, TOOLS) == ("", expected)
