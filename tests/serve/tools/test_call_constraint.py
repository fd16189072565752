from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fastserve.constraint import Grammar
from fastserve.errors import ConstraintError
from fastserve.serve.tools.call_constraint import call_constraint
from fastserve.serve.tools.format import HERMES, JSON, LLAMA, MISTRAL, ToolFormat
from fastserve.serve.tools.tool import Tool, ToolChoice
from random_walk import byte_compiler, draw_texts
from serve.tools.conftest import read_calls

ADD = Tool(
    name="add",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/number"}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "$defs": {"number": {"type": "integer", "not": {"minimum": 10}}},  # which has to be narrowed
    },
)
PAINT = Tool(
    name="paint.wall",
    parameters={
        "type": "object",
        "properties": {"colour": {"enum": ["red", "grün"]}},
        "required": ["colour"],
    },
)
FORMATS = [HERMES, LLAMA, MISTRAL, JSON]
REQUIRED = ToolChoice("required")


def check(text: str, format_: ToolFormat, tools: list[Tool]) -> list[str]:
    """The names of the calls that a text consists of, whose arguments follow their schemas."""
    rest, calls = read_calls(text, format_, tools)
    assert rest == ""
    schemas = {tool.name: tool.parameters for tool in tools}
    for call in calls:
        jsonschema.Draft202012Validator(schemas[call.name]).validate(json.loads(call.arguments))
    return [call.name for call in calls]


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_a_required_call_is_one_of_the_tools_with_valid_arguments(format_: ToolFormat) -> None:
    constraint = call_constraint([ADD, PAINT], REQUIRED, format_, is_parallel=False)
    assert constraint is not None
    names = [check(text, format_, [ADD, PAINT]) for text in draw_texts(constraint, count=20)]
    assert {len(each) for each in names} == {1}
    assert {name for each in names for name in each} == {"add", "paint.wall"}


@pytest.mark.parametrize(
    ("format_", "text"),
    [
        (HERMES, "<tool_call>\n{0}\n</tool_call>\n<tool_call>\n{0}\n</tool_call>"),
        (LLAMA, "{0}; {0}"),
        (MISTRAL, "[TOOL_CALLS][{0}, {0}]"),
        (JSON, "{0}; {0}"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_parallel_calls_may_be_several(format_: ToolFormat, text: str) -> None:
    call = f'{{"name": "paint.wall", "{format_.arguments_key}": {{"colour": "red"}}}}'
    text = text.format(call)
    assert check(text, format_, [PAINT]) == ["paint.wall", "paint.wall"]
    assert allows(call_constraint([ADD, PAINT], REQUIRED, format_), text)
    assert not allows(call_constraint([ADD, PAINT], REQUIRED, format_, is_parallel=False), text)
    assert not allows(call_constraint([ADD, PAINT], ToolChoice("named", "paint.wall"), format_), text)


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_a_named_call_is_of_that_tool_alone(format_: ToolFormat) -> None:
    constraint = call_constraint([ADD, PAINT], ToolChoice("named", "paint.wall"), format_)
    assert constraint is not None
    for text in draw_texts(constraint, count=10):
        assert check(text, format_, [ADD, PAINT]) == ["paint.wall"]


@pytest.mark.parametrize("kind", ["none", "auto"])
def test_a_call_that_is_not_forced_has_no_constraint(kind: Any) -> None:
    assert call_constraint([ADD], ToolChoice(kind), HERMES) is None


def allows(constraint: Grammar | None, text: str) -> bool:
    """Whether a completion may begin so."""
    assert constraint is not None
    return byte_compiler().compile(constraint).num_fitting(list(text.encode())) == len(text.encode())


@pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.name)
def test_the_calls_of_strict_tools_follow_their_schemas_where_the_model_decides(format_: ToolFormat) -> None:
    strict = replace(PAINT, is_strict=True)
    constraint = call_constraint([ADD, strict], ToolChoice("auto"), format_)
    assert allows(constraint, "Any text. {<tool_cal")
    opening = {"hermes": "<tool_call>\n", "mistral": "[TOOL_CALLS]["}.get(format_.name, "")
    call = f'{opening}{{"name": "paint.wall", "{format_.arguments_key}": {{"colour": "'
    assert allows(constraint, f"{call}red")
    assert not allows(constraint, f"{call}blue")


def test_text_and_calls_take_turns_where_the_model_decides() -> None:
    constraint = call_constraint([replace(PAINT, is_strict=True)], ToolChoice("auto"), HERMES)
    call = '<tool_call>\n{"name": "paint.wall", "arguments": {"colour": "red"}}\n</tool_call>'
    assert allows(constraint, f"One: {call}\nTwo: {call} done")
    assert not allows(constraint, f"One: {call}\nTwo: <tool_call>x")


def test_one_call_is_the_end_where_calls_must_not_be_several() -> None:
    constraint = call_constraint([PAINT], ToolChoice("auto"), HERMES, is_parallel=False)
    call = '<tool_call>\n{"name": "paint.wall", "arguments": {"colour": "red"}}\n</tool_call>'
    assert allows(constraint, f"One: {call}")
    assert not allows(constraint, f"One: {call} ")


def test_an_opening_that_is_a_special_token_is_demanded_by_its_number() -> None:
    constraint = call_constraint([ADD], REQUIRED, replace(MISTRAL, opening_token_id=5))
    assert constraint is not None
    assert constraint.grammar.startswith('start: <[5]> "["')


def test_a_schema_that_is_not_supported_is_refused_by_its_keyword() -> None:
    parameters = {
        "type": "object",
        "properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}},
    }
    with pytest.raises(ConstraintError, match="uniqueItems"):
        call_constraint([Tool(name="tag", parameters=parameters)], REQUIRED, HERMES)


@pytest.mark.parametrize("file", ["BFCL_v4_simple_python", "BFCL_v4_multiple"])
def test_published_functions_are_called_with_valid_arguments(shared_data: Path, file: str) -> None:
    """Of the Berkeley function-calling leaderboard, whose types are Python's."""
    lines = (shared_data / "tool_bfcl_v4" / f"{file}.json").read_text(encoding="utf-8").splitlines()
    for line in lines[::40]:
        tools = [
            Tool(name=f["name"], description=f["description"], parameters=to_json_schema(f["parameters"]))
            for f in json.loads(line)["function"]
        ]
        constraint = call_constraint(tools, REQUIRED, HERMES, is_parallel=False)
        assert constraint is not None
        texts = draw_texts(constraint, count=4, most_bytes=1000)
        assert texts
        for text in texts:
            assert len(check(text, HERMES, tools)) == 1


def to_json_schema(schema: Any) -> Any:
    types = {"dict": "object", "float": "number", "tuple": "array", "any": ["string", "number"]}
    if isinstance(schema, list):
        return [to_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    converted = {key: to_json_schema(value) for key, value in schema.items() if key != "optional"}
    if isinstance(schema.get("type"), str):
        converted["type"] = types.get(schema["type"], schema["type"])
    return converted
