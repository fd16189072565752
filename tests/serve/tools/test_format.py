from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fastserve.checkpoint.chat_template import render_chat
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import UnsupportedError
from fastserve.serve.tools.format import HERMES, JSON, LLAMA, MISTRAL, ToolFormat, detect_format, tell_tools
from fastserve.serve.tools.tool import Call, Tool, ToolChoice
from serve.tools.conftest import read_calls

AUTO = ToolChoice("auto")
ADD = Tool(
    name="add", description="Adds.", parameters={"type": "object", "properties": {"a": {"type": "integer"}}}
)


@dataclass
class Words:
    ids: dict[str, int] = field(default_factory=dict)
    special_ids: frozenset[int] = frozenset()

    def token_id(self, text: str) -> int | None:
        return self.ids.get(text)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools %}...<tool_call>{{ call | tojson }}</tool_call>{% endif %}", HERMES),
        ('{% if tools %}{"name": function name, "parameters": ...}{{ "<|python_tag|>" }}{% endif %}', LLAMA),
        ('{% if message.role == "ipython" %}{% endif %}{{ \'"parameters": \' }}', LLAMA),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", MISTRAL),
        ("{{ tools }}", JSON),
        ("{{ messages }}", replace(HERMES, has_template=False)),
        (None, replace(HERMES, has_template=False)),
    ],
)
def test_the_format_is_read_off_the_template(template: str | None, expected: ToolFormat) -> None:
    assert detect_format(template, Words()) == expected


def test_an_opening_that_is_a_special_token_is_known_by_its_number() -> None:
    words = Words({"[TOOL_CALLS]": 5, "<tool_call>": 6}, frozenset({5}))
    assert detect_format("[TOOL_CALLS]", words).opening_token_id == 5
    assert detect_format("<tool_call>", words).opening_token_id is None


def test_calls_that_are_not_json_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="teaches calls as <function="):
        detect_format("<tool_call><function=", Words())


def test_a_template_that_knows_tools_gets_them() -> None:
    messages = [{"role": "user", "content": "2 + 2?"}]
    told, tools = tell_tools(messages, [ADD], HERMES, AUTO)
    assert told == messages
    assert tools == [ADD.to_template()]
    assert tell_tools(messages, [ADD], HERMES, ToolChoice("none")) == (messages, None)


def test_a_template_that_knows_none_is_told_by_the_system_message(
    model_dir: Callable[[str], Path],
) -> None:
    checkpoint = open_checkpoint(model_dir("smollm2-135m-instruct"))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    format_ = detect_format(checkpoint.chat_template, tokenizer)
    assert (format_.name, format_.has_template) == ("hermes", False)
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    told, tools = tell_tools(messages, [ADD], format_, AUTO)
    assert tools is None
    prompt = render_chat(checkpoint.chat_template, told, special_tokens=tokenizer.special_tokens)
    assert json.dumps(ADD.to_template()) in prompt
    assert "Be brief." in prompt
    assert read_calls(told[2]["content"], format_, [ADD]) == ("", [Call("add", '{"a": 1}')])
    assert told[2]["content"] in prompt
