from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastserve.checkpoint import open_checkpoint
from fastserve.checkpoint.chat_template import render_chat
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import TemplateError

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to the following functions.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

FEATURES = """\
{%- macro shout(text, times=1) -%}{{ text | upper }}{% for _ in range(times) %}!{% endfor %}{%- endmacro -%}
{%- set ns = namespace(last=none, seen=[], self=1) %}
{%- for message in messages recursive %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if loop.index > 4 %}{% break %}{% endif %}
    {%- set ns.last = message.role ~ loop.index ~ '/' ~ loop.length ~ (',' if not loop.last else '.') %}
    {%- set ns.seen = ns.seen + [message.role] %}
    {{ shout(ns.last, times=loop.revindex) }}{{ loop.cycle('a', 'b') }}
    {{ loop.previtem.role if loop.previtem }}
{%- endfor %}
{% generation %}{{ ns.seen | join('|') ~ 3 * 2 ~ 2 ** 3 ~ 7 // 2 ~ '-' * 3 }}{% endgeneration %}
{%- for key, value in {'b': 1, 'a': [1, {'x': 'é<&>'}]} | dictsort %}
    {{- key }}={{ value | tojson }};
{%- endfor %}
{{ dict(a=1) | tojson(indent=2) }}{{ dict.fromkeys(['k']) | tojson }}{{ strftime_now('%Y') }}
{{ undefined_name }}{{ 'yes' if enable_thinking is defined and enable_thinking else 'no' }}
{% for x in [] %}never{% else %}empty{% endfor %}
   {% if true %}
   kept
   {% endif %}
{{ messages[-1].reasoning_content if messages[-1].reasoning_content }}
"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "  <b>Hi</b>  \n"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "é 東京"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x", "thinking": "hm"}],
]

TOOLS = [{"type": "function", "function": {"name": "now", "description": "The time <é>", "parameters": {}}}]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def reference(shared_data: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "model_stories260K" / "tokenizer.json"), **SPECIAL_TOKENS
    )


def outcome(render: Callable[[], str]) -> str | None:
    try:
        return render()
    except Exception:
        return None


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3, MISTRAL, FEATURES], ids=["chatml", "llama3", "mistral", "features"]
)
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_conversation_is_rendered_as_in_transformers(
    reference: PreTrainedTokenizerFast,
    template: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None,
) -> None:
    expected = outcome(
        lambda: reference.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )
    )
    ours = outcome(
        lambda: render_chat(
            template,
            messages,
            special_tokens=SPECIAL_TOKENS,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )
    )
    assert ours == expected
    if template is not MISTRAL:
        assert ours


def test_tool_calls_and_variables_are_rendered_as_in_transformers(reference: PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": "é"}}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": {"time": "12:00"}},
    ]
    for template in (LLAMA3, FEATURES):
        variables = {"enable_thinking": True, "date_string": "1 May 2025"}
        expected = reference.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            tools=TOOLS,
            add_generation_prompt=True,
            **variables,
        )
        assert expected == render_chat(
            template, messages, special_tokens=SPECIAL_TOKENS, tools=TOOLS, variables=variables
        )


def test_smollm2_is_rendered_as_in_transformers(
    reference: PreTrainedTokenizerFast, model_dir: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(model_dir("smollm2-135m-instruct"))
    special_tokens = Tokenizer.from_checkpoint(checkpoint).special_tokens
    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(
            messages, chat_template=checkpoint.chat_template, tokenize=False, add_generation_prompt=True
        )
        assert render_chat(checkpoint.chat_template, messages, special_tokens=special_tokens) == expected
        assert expected.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_date_is_todays() -> None:
    assert render_chat("{{ strftime_now('%Y') }}", [], special_tokens={}) == str(datetime.now().year)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model has no chat template"),
        ("{% if %}", "has an error in line 1"),
        ("{{ raise_exception('roles must alternate') }}", "refused: roles must alternate"),
        ("{{ messages[3].content.text }}", "refused: list object has no element 3"),
        ("{{ 1 // 0 }}", "failed: ZeroDivisionError"),
        ("{{ messages.append(1) }}", "refused: access to attribute 'append'.*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refused: access to attribute '__class__'.*unsafe"),
        ("{{ dict.__class__.mro }}", "refused: access to attribute '__class__'.*unsafe"),
        ("{% set n = namespace(__class__=1) %}", "refused: the namespace attribute '__class__' begins with"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "refused: the namespace attribute '_x' begins with"),
        ("{% include 'other' %}", "refused: no loader|failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refused: maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_fails_says_why(template: str | None, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render_chat(template, [{"role": "user", "content": "Hi"}], special_tokens={})


ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over one list": (
        "{% set x = range(9999) | list %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}"
    ),
    "branching macro": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "recursive loop": (
        "{% set x = range(99) | list %}{% for a in x recursive %}{{ loop(x) if loop.depth < 9 }}{% endfor %}"
    ),
    "filters in a loop": (
        "{% set x = range(99999) | list %}{% for i in range(99999) %}{% set y = x | list %}{% endfor %}"
    ),
    "long output": "{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
    "repeated text": "{{ 'x' * 10 ** 12 }}",
    "repeated list": "{{ (10 ** 12 * [1]) | length }}",
    "doubled by tilde": (
        "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    ),
    "doubled by plus": (
        "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}"
    ),
    "growing list": (
        "{% set n = namespace(s=[]) %}{% for i in range(99999) %}{% set n.s = n.s + [1] %}{% endfor %}"
    ),
    "power": "{{ 10 ** 10 ** 10 ** 10 ** 10 }}",
    "squares": "{% set n = namespace(s=9) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name: str) -> None:
    start = time.process_time()
    with pytest.raises(TemplateError, match=r"takes more than 1000000 steps|a number of more than 4096 bits"):
        render_chat(ENDLESS[name], [], special_tokens={})
    assert time.process_time() - start < 10


def test_a_long_conversation_is_within_the_bounds() -> None:
    messages = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "y" * 1000}] * 5000
    for template in (CHATML, LLAMA3, MISTRAL):
        assert len(render_chat(template, messages, special_tokens=SPECIAL_TOKENS)) > 10_000_000
