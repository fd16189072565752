"""Functions that a request offers, and which of them are to be called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Literal

from fastserve.errors import OptionError
from fastserve.types import JsonObject

MAX_TOOLS = 128  # as OpenAI's API has it
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")  # OpenAI's, and the dot that names of modules have


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function.

    Attributes:
        parameters: the schema of its arguments, an object.
        is_strict: a call's arguments follow the schema, be the call forced or not.
    """

    name: str
    description: str = ""
    parameters: JsonObject = field(default_factory=lambda: {"type": "object", "properties": {}})
    is_strict: bool = False

    def to_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": dict(self.parameters),
            },
        }


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`none`: no call; `auto`: the model decides; `required`: at least one; `named`: the one of `name`."""

    kind: Literal["none", "auto", "required", "named"]
    name: str | None = None

    @property
    def is_forced(self) -> bool:
        return self.kind in ("required", "named")


@dataclass(frozen=True, slots=True)
class Call:
    """A call that a model makes. `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


def parse_tools(tools: Seq[JsonObject]) -> list[Tool]:
    """The functions of OpenAI's `tools`: `{"type": "function", "function": {"name": ..., ...}}`.

    Raises:
        OptionError: an entry is no function, or has a field that is missing or of another kind, or two have
            one name, or there are too many.
    """
    if len(tools) > MAX_TOOLS:
        raise OptionError(
            f"there are {len(tools)} tools; the most is {MAX_TOOLS}", hint="offer fewer", option="tools"
        )
    parsed = [_parse_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
    names = [tool.name for tool in parsed]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(
                f"two tools are called {name!r}", hint="give each a name of its own", option="tools"
            )
    return parsed


def parse_tool_choice(choice: str | JsonObject | None, tools: Seq[Tool]) -> ToolChoice:
    """OpenAI's `tool_choice`; by default `auto` where there are tools.

    Raises:
        OptionError: it is of no known kind, or names a function that is not offered, or there are no tools to
            choose from.
    """
    if choice is None:
        return ToolChoice("auto" if tools else "none")
    if choice == "none":
        return ToolChoice("none")
    if not tools:
        raise OptionError(
            f"tool_choice is {choice!r}, but there are no tools",
            hint="send tools as well",
            option="tool_choice",
        )
    if choice == "auto":
        return ToolChoice("auto")
    if choice == "required":
        return ToolChoice("required")
    name = _text(choice, "function", "name") if isinstance(choice, Mapping) else None
    if name is None:
        raise OptionError(
            f"tool_choice={choice!r} is unknown",
            hint='choose none, auto, required or {"type": "function", "function": {"name": ...}}',
            option="tool_choice",
        )
    names = [tool.name for tool in tools]
    if name not in names:
        raise OptionError(
            f"tool_choice names {name!r}; the tools are {', '.join(names)}",
            hint="name one of them",
            option="tool_choice",
        )
    return ToolChoice("named", name)


def _parse_tool(place: str, tool: JsonObject) -> Tool:
    if tool.get("type") != "function" or not isinstance(function := tool.get("function"), Mapping):
        raise OptionError(
            f"{place} is no function: its type is {tool.get('type')!r}",
            hint='give {"type": "function", "function": {"name": ..., "parameters": ...}}',
            option=place,
        )
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(
            f"{place} has the name {name!r}",
            hint="use up to 64 letters, digits, underscores, dots or dashes",
            option=place,
        )
    description = function.get("description") or ""
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(description, str):
        raise OptionError(
            f"{place}: the description of {name} is no text",
            hint="give a text, or leave it out",
            option=place,
        )
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise OptionError(
            f"{place}: the parameters of {name} are not the schema of an object",
            hint='give {"type": "object", "properties": ...}, or leave them out',
            option=place,
        )
    is_strict = bool(function.get("strict"))
    return Tool(name=name, description=description, parameters=parameters, is_strict=is_strict)


def _text(value: Any, *path: str) -> str | None:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None
