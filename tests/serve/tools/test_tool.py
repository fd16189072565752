from __future__ import annotations

import re
from typing import Any

import pytest

from fastserve.errors import OptionError
from fastserve.serve.tools.tool import MAX_TOOLS, Tool, ToolChoice, parse_tool_choice, parse_tools

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [Tool(name="add", parameters=SCHEMA), Tool(name="now")]


def function(**fields: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", **fields}}


def test_functions_are_read_with_their_schemas() -> None:
    tools = parse_tools([function(description="Adds.", parameters=SCHEMA), function(name="now", strict=True)])
    assert tools[0] == Tool(name="add", description="Adds.", parameters=SCHEMA)
    assert tools[1] == Tool(name="now", parameters={"type": "object", "properties": {}}, is_strict=True)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "code_interpreter"}], "tools[0] is no function: its type is 'code_interpreter'"),
        ([{"type": "function"}], "tools[0] is no function"),
        ([function(), function(name="a b")], "tools[1] has the name 'a b'"),
        ([function(name=None)], "tools[0] has the name None"),
        ([function(), function()], "two tools are called 'add'"),
        ([function(parameters=[1])], "tools[0]: the parameters of add are not the schema of an object"),
        ([function(parameters={"type": "string"})], "tools[0]: the parameters of add are not the schema"),
        ([function(description=1)], "tools[0]: the description of add is no text"),
        ([function(name=f"f{i}") for i in range(MAX_TOOLS + 1)], f"there are {MAX_TOOLS + 1} tools"),
    ],
)
def test_what_is_no_function_is_refused_by_its_place(tools: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_tools(tools)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("auto", ToolChoice("auto")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "now"}}, ToolChoice("named", "now")),
    ],
)
def test_the_choice_is_read(choice: Any, expected: ToolChoice) -> None:
    assert parse_tool_choice(choice, TOOLS) == expected


def test_without_tools_nothing_is_called() -> None:
    assert parse_tool_choice(None, []) == ToolChoice("none")
    with pytest.raises(OptionError, match="tool_choice is 'auto', but there are no tools"):
        parse_tool_choice("auto", [])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("always", "tool_choice='always' is unknown"),
        ({"type": "function"}, "is unknown"),
        (
            {"type": "function", "function": {"name": "sub"}},
            "tool_choice names 'sub'; the tools are add, now",
        ),
    ],
)
def test_a_choice_that_there_is_not_is_refused(choice: Any, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_tool_choice(choice, TOOLS)
