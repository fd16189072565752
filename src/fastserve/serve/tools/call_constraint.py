"""What a completion must be where its calls are to follow the schemas of their arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq

from fastserve.constraint import Grammar, JsonSchema
from fastserve.engine.guide import supported_schema
from fastserve.serve.tools.format import ToolFormat
from fastserve.serve.tools.tool import Tool, ToolChoice

_TEXT = r"TEXT: /(.|\n)*/"
_PLAIN_TEXT = r"TEXT: /([^\[{ \t\r\n](.|\n)*)?/"  # no call, where one needs no opening


def call_constraint(
    tools: Seq[Tool], choice: ToolChoice, format_: ToolFormat, *, is_parallel: bool = True
) -> Grammar | None:
    """The grammar of a completion. A forced call is one of the named function, or, where `required`, one or,
    if parallel, several of any. Where the model decides, there are text and calls, none of them free: only
    with a tool that is strict, or where calls must not be several; else None.

    >>> from fastserve.serve.tools.format import JSON
    >>> constraint = call_constraint([Tool(name="now")], ToolChoice("required"), JSON, is_parallel=False)
    >>> print(constraint.grammar.splitlines()[2])
    call_0: "{\\"name\\": \\"now\\", \\"arguments\\": " arguments_0 "}"

    Raises:
        ConstraintError: a schema has an error or something that is not supported, or they are too large
            together.
    """
    is_free = is_parallel and not any(tool.is_strict for tool in tools)
    if choice.kind == "none" or (choice.kind == "auto" and is_free):
        return None
    offered = [tool for tool in tools if choice.name in (None, tool.name)]
    is_repeated = is_parallel and choice.kind != "named"
    rules = _frame(format_, is_repeated=is_repeated, is_forced=choice.is_forced)
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(offered))))
    for index, tool in enumerate(offered):
        head = f'{{"name": {json.dumps(tool.name)}, "{format_.arguments_key}": '
        rules += [
            f'call_{index}: {_literal(head)} arguments_{index} "}}"',
            f"arguments_{index}: %json {supported_schema(JsonSchema(tool.parameters)).text}",
        ]
    return Grammar("\n".join(rules))


def _frame(format_: ToolFormat, *, is_repeated: bool, is_forced: bool) -> list[str]:
    """The rules of a whole completion."""
    if format_.opening is None or format_.is_bare:
        calls = f"call ({_literal('; ')} call)*" if is_repeated else "call"
        return [f"start: {calls}"] if is_forced else [f"start: {calls} | TEXT", _PLAIN_TEXT]
    opening = _literal(format_.opening)
    text_before, rules = f"head[lazy]: TEXT {opening}", [_TEXT]
    if format_.opening_token_id is not None:
        opening = f"<[{format_.opening_token_id}]>"
        text_before = f"head: TEXT {opening}"
    if format_.is_list:
        rest = f'"[" call ({_literal(", ")} call)* "]"' if is_repeated else '"[" call "]"'
        is_repeated = False
    else:
        newline = _literal("\n")
        rest = f"{newline} call {_literal(chr(10) + (format_.closing or ''))}"
    if is_forced:
        again = f" ({_literal(chr(10))} {opening} {rest})*" if is_repeated else ""
        return [f"start: {opening} {rest}{again}"]
    start = f"start: (head {rest})* TEXT" if is_repeated else f"start: head {rest} | TEXT"
    return [start, text_before, *rules]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
