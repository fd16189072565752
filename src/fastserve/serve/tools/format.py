"""How the families write calls, as data, and which of these a model's chat template teaches.

- `hermes` (Hermes, Qwen, SmolLM): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or a list;
- `llama` (Llama 3): `{"name": ..., "parameters": {...}}`, the whole answer; `<|python_tag|>` may be before;
- `mistral`: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}`;
- `json` (others whose template has tools): `{"name": ..., "arguments": {...}}`, or a list: the whole answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastserve.errors import UnsupportedError
from fastserve.serve.tools.tool import Tool, ToolChoice
from fastserve.types import JsonObject


class Vocabulary(Protocol):
    """What is asked of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_id(self, text: str) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How calls are written.

    `opening` comes before a call, or several; a call without it counts only where `is_bare` and the answer
    begins with it. `closing` ends them; None: the next `opening`, or the end of the answer.
    """

    name: str
    opening: str | None
    closing: str | None
    is_bare: bool
    arguments_key: str  # as templates teach it; whichever the model writes is read
    is_list: bool  # calls are written as one list
    has_template: bool = True  # the model's own template tells of tools
    opening_token_id: int | None = None  # where `opening` is a special token, which is no text to a grammar


HERMES = ToolFormat(
    name="hermes",
    opening="<tool_call>",
    closing="</tool_call>",
    is_bare=False,
    arguments_key="arguments",
    is_list=False,
)
LLAMA = ToolFormat(
    name="llama",
    opening="<|python_tag|>",
    closing=None,
    is_bare=True,
    arguments_key="parameters",
    is_list=False,
)
MISTRAL = ToolFormat(
    name="mistral",
    opening="[TOOL_CALLS]",
    closing=None,
    is_bare=False,
    arguments_key="arguments",
    is_list=True,
)
JSON = ToolFormat(
    name="json", opening=None, closing=None, is_bare=True, arguments_key="arguments", is_list=False
)


def detect_format(template: str | None, vocabulary: Vocabulary) -> ToolFormat:
    """The format that a model's chat template teaches; `hermes` where it knows of no tools, which
    `tell_tools` then tells of.

    Raises:
        UnsupportedError: calls that are not written as JSON.
    """
    template = template or ""
    if "<function=" in template:
        raise UnsupportedError(
            "the model's chat template teaches calls as <function=...>, which are not supported",
            hint="use a model whose calls are JSON",
        )
    if "[TOOL_CALLS]" in template:
        found = MISTRAL
    elif "<tool_call>" in template:
        found = HERMES
    elif "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        found = LLAMA
    elif "tools" in template:
        found = JSON
    else:
        found = replace(HERMES, has_template=False)
    token_id = vocabulary.token_id(found.opening) if found.opening is not None else None
    return replace(found, opening_token_id=token_id if token_id in vocabulary.special_ids else None)


def tell_tools(
    messages: Seq[Mapping[str, Any]], tools: Seq[Tool], format_: ToolFormat, choice: ToolChoice
) -> tuple[list[Mapping[str, Any]], list[JsonObject] | None]:
    """What to render by the chat template: messages, and the tools for its `tools`.

    A template that knows of none is told of them by the system message, and of earlier calls by their texts.
    """
    if not format_.has_template:
        messages = [_with_calls_as_text(message) for message in messages]
    if not tools or choice.kind == "none":
        return list(messages), None
    described = [tool.to_template() for tool in tools]
    if format_.has_template:
        return list(messages), list(described)
    first, *others = messages
    text = _INSTRUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in described))
    if first.get("role") == "system":
        return [{**first, "content": f"{first.get('content', '')}\n\n{text}"}, *others], None
    return [{"role": "system", "content": text}, *messages], None


_INSTRUCTION = """\
You may call functions to answer the user. These are their signatures, one a line:
<tools>
{tools}
</tools>
For each call write a JSON object with the function's name and its arguments within tags:
<tool_call>
{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}
</tool_call>"""


def _with_calls_as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [
        f"{HERMES.opening}\n{json.dumps(call['function'], ensure_ascii=False)}\n{HERMES.closing}"
        for call in calls
    ]
    text = "\n".join([message["content"], *texts] if message.get("content") else texts)
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}
