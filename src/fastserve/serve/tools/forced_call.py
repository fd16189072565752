"""What a completion must be where a call is forced: the format's frame around arguments that follow their
schema."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq

from fastserve.constraint import Grammar, JsonSchema
from fastserve.engine.guide import supported_schema
from fastserve.serve.tools.format import ToolFormat
from fastserve.serve.tools.tool import Tool, ToolChoice


def forced_call_constraint(
    tools: Seq[Tool], choice: ToolChoice, format_: ToolFormat, *, is_parallel: bool = True
) -> Grammar | None:
    """The grammar of one call, or, where `required` and parallel, of several; None where none is forced.

    >>> from fastserve.serve.tools.format import JSON
    >>> constraint = forced_call_constraint([Tool(name="now")], ToolChoice("required"), JSON,
    is_parallel=False) >>> print(constraint.grammar.splitlines()[2]) call_0: "{\\"name\\": \\"now\\",
    \\"arguments\\": " arguments_0 "}"

    Raises:
        ConstraintError: a schema has an error or something that is not supported, or they are too large
            together.
    """
    if not choice.is_forced:
        return None
    offered = [tool for tool in tools if choice.name in (None, tool.name)]
    is_repeated = is_parallel and choice.kind == "required"
    rules = [f"start: {_frame(format_, is_repeated=is_repeated)}", f"call: {_alternatives(len(offered))}"]
    for index, tool in enumerate(offered):
        head = f'{{"name": {json.dumps(tool.name)}, "{format_.arguments_key}": '
        rules += [
            f'call_{index}: {_literal(head)} arguments_{index} "}}"',
            f"arguments_{index}: %json {supported_schema(JsonSchema(tool.parameters)).text}",
        ]
    return Grammar("\n".join(rules))


def _frame(format_: ToolFormat, *, is_repeated: bool) -> str:
    """The rule of a whole completion."""
    opening = ""
    if format_.opening is not None and not format_.is_bare:
        is_special = format_.opening_token_id is not None
        opening = f"<[{format_.opening_token_id}]>" if is_special else _literal(format_.opening)
    if format_.is_list:
        calls = f'"[" call ({_literal(", ")} call)* "]"' if is_repeated else '"[" call "]"'
        return f"{opening} {calls}"
    if format_.closing is None:
        separator = "; " if format_.is_bare else "\n"
        return f"{opening} call ({_literal(separator)} call)*" if is_repeated else f"{opening} call"
    one = f"{opening} {_literal(chr(10))} call {_literal(chr(10) + format_.closing)}"
    return f"{one} ({_literal(chr(10))} {one})*" if is_repeated else one


def _alternatives(count: int) -> str:
    return " | ".join(f"call_{index}" for index in range(count))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
