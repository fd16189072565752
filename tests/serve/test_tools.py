"""Calls of tools over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fastserve.config import EngineOptions
from fastserve.constraint import Grammar
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.chat_tools import ChatTools
from fastserve.serve.options import ServeOptions
from serve.conftest import STORIES, Server, events

pytest.importorskip("fastserve._native")

TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call>{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}assistant:"
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS, **fields}}


CHAT = {
    "model": STORIES,
    "messages": [{"role": "user", "content": "Rain?"}],
    "tools": [function("weather"), function("forecast")],
    "max_tokens": 120,
}
NAMED = {"type": "function", "function": {"name": "forecast"}}


@pytest.fixture(scope="module")
def server(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its template tells of tools."""
    folder = tmp_path_factory.mktemp("tools") / STORIES
    folder.mkdir()
    for file in stories.iterdir():
        if file.suffix != ".gguf":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = Server(folder, ServeOptions(), EngineOptions(threads=1, kv_memory="1MiB"), ApiKeys({}))
    yield made
    made.close()


def choice_of(response: Any) -> Any:
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_named_function_is_called_with_valid_arguments(server: Server, seed: int) -> None:
    choice = choice_of(server.post("/v1/chat/completions", {**CHAT, "tool_choice": NAMED, "seed": seed}))
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert (call["type"], call["function"]["name"]) == ("function", "forecast")
    jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)


def test_a_required_call_is_of_one_of_the_tools(server: Server) -> None:
    body = {**CHAT, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.5}
    names = set()
    for seed in range(6):
        (call,) = choice_of(server.post("/v1/chat/completions", {**body, "seed": seed}))["message"][
            "tool_calls"
        ]
        names.add(call["function"]["name"])
        jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)
    assert names <= {"weather", "forecast"}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_streamed_call_joined_is_the_whole_one(server: Server, choice: Any) -> None:
    body = {**CHAT, "tool_choice": choice, "seed": 5, "max_tokens": 90}
    whole = choice_of(server.post("/v1/chat/completions", body))
    *data, done = events(server.post("/v1/chat/completions", {**body, "stream": True}))
    assert done == "[DONE]"
    choices = [one for text in data for one in json.loads(text)["choices"]]
    calls: dict[int, dict[str, str]] = {}
    for one in choices:
        for delta in one["delta"].get("tool_calls", ()):
            call = calls.setdefault(delta["index"], {"name": "", "arguments": ""})
            if "id" in delta:
                assert delta["type"] == "function"
                call["name"] = delta["function"]["name"]
            call["arguments"] += delta["function"]["arguments"]
    assert list(calls.values()) == [call["function"] for call in whole["message"]["tool_calls"]]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    assert len([one for one in choices if "tool_calls" in one["delta"]]) > 2


def test_a_call_that_is_not_wanted_is_text(server: Server) -> None:
    body = {**CHAT, "tool_choice": "none", "regex": '<tool_call>\\{"name": "weather"\\}</tool_call>'}
    choice = choice_of(server.post("/v1/chat/completions", body))
    assert choice["message"]["content"] == '<tool_call>{"name": "weather"}</tool_call>'
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


def test_where_the_model_decides_it_may_answer_with_text(server: Server) -> None:
    choice = choice_of(server.post("/v1/chat/completions", {**CHAT, "temperature": 0, "max_tokens": 12}))
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"


def test_earlier_calls_and_their_results_are_told(server: Server) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
    }
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "no"},
    ]
    body = {**CHAT, "messages": messages, "max_tokens": 4}
    longer = server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
    shorter = server.post("/v1/chat/completions", {**body, "messages": messages[:1]}).json()["usage"]
    assert longer > shorter["prompt_tokens"] + 20


# Anthropic's API

MESSAGE = {
    "model": STORIES,
    "messages": [{"role": "user", "content": "Rain?"}],
    "tools": [{"name": name, "input_schema": PARAMETERS} for name in ("weather", "forecast")],
    "max_tokens": 120,
}


def blocks_of(response: Any) -> tuple[list[dict[str, Any]], str]:
    """The content that a stream builds up, without the names of calls, and why it has ended."""
    data = [
        json.loads(text.partition("data: ")[2]) for text in response.text.split("\n\n") if "data: " in text
    ]
    blocks: list[dict[str, Any]] = []
    is_open = False
    for one in data:
        match one["type"]:
            case "content_block_start":
                assert not is_open
                assert one["index"] == len(blocks)
                is_open = True
                blocks.append({**one["content_block"], "input": ""})
            case "content_block_delta":
                assert one["index"] == len(blocks) - 1
                delta = one["delta"]
                blocks[-1]["input"] += delta.get("partial_json", "")
                blocks[-1]["text"] = blocks[-1].get("text", "") + delta.get("text", "")
            case "content_block_stop":
                is_open = False
    assert not is_open
    (end,) = (one for one in data if one["type"] == "message_delta")
    return blocks, end["delta"]["stop_reason"]


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "forecast"}], ids=["any", "tool"]
)
@pytest.mark.parametrize("is_single", [False, True])
def test_a_message_calls_the_tool_that_is_asked_for(server: Server, choice: Any, is_single: bool) -> None:
    body = {
        **MESSAGE,
        "tool_choice": {**choice, "disable_parallel_tool_use": is_single},
        "max_tokens": 400,
        "temperature": 0,
    }
    response = server.post("/v1/messages", body)
    assert response.status_code == 200, response.text
    answer = response.json()
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert calls
    assert len(calls) == len(answer["content"]) or answer["stop_reason"] == "max_tokens"  # within a name
    for block in calls:
        assert block["name"] in (("weather", "forecast") if choice["type"] == "any" else ("forecast",))
        if answer["stop_reason"] == "tool_use":
            jsonschema.validate(block["input"], PARAMETERS)
    if is_single or choice["type"] == "tool":
        assert (len(answer["content"]), answer["stop_reason"]) == (1, "tool_use")
    streamed, stop_reason = blocks_of(server.post("/v1/messages", {**body, "stream": True}))
    assert stop_reason == answer["stop_reason"]
    assert [block.get("name") for block in streamed] == [block.get("name") for block in answer["content"]]
    if stop_reason == "tool_use":
        inputs = [json.loads(block["input"]) for block in streamed]
        assert inputs == [block["input"] for block in answer["content"]]


def test_a_message_without_calls_is_one_block_of_text(server: Server) -> None:
    body = {**MESSAGE, "max_tokens": 12, "temperature": 0}
    answer = server.post("/v1/messages", body).json()
    streamed, stop_reason = blocks_of(server.post("/v1/messages", {**body, "stream": True}))
    assert [block["type"] for block in answer["content"]] == ["text"]
    assert [block["text"] for block in streamed] == [block["text"] for block in answer["content"]]
    assert stop_reason == answer["stop_reason"] == "max_tokens"


def test_tools_count_as_tokens_of_a_message(server: Server) -> None:
    body = {key: value for key, value in MESSAGE.items() if key != "max_tokens"}
    with_tools = server.post("/v1/messages/count_tokens", body).json()["input_tokens"]
    without = server.post("/v1/messages/count_tokens", {**body, "tools": None}).json()["input_tokens"]
    assert with_tools > without


# OpenAI's responses

RESPONSE = {
    "model": STORIES,
    "input": "Rain?",
    "tools": [
        {"type": "function", "name": name, "parameters": PARAMETERS} for name in ("weather", "forecast")
    ],
    "max_output_tokens": 200,
    "temperature": 0,
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "name": "forecast"}], ids=["required", "named"]
)
def test_a_response_calls_the_function_that_is_asked_for(server: Server, choice: Any) -> None:
    body = {**RESPONSE, "tool_choice": choice, "parallel_tool_calls": False}
    response = server.post("/v1/responses", body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["status"] == "completed"
    assert (answer["tool_choice"], answer["parallel_tool_calls"]) == (choice, False)
    assert answer["tools"] == RESPONSE["tools"]
    (item,) = answer["output"]
    assert item["type"] == "function_call"
    assert item["name"] in (("weather", "forecast") if choice == "required" else ("forecast",))
    jsonschema.validate(json.loads(item["arguments"]), PARAMETERS)


def test_a_streamed_response_grows_to_what_it_is_whole(server: Server) -> None:
    body = {**RESPONSE, "tool_choice": "required", "parallel_tool_calls": False}
    whole = server.post("/v1/responses", body).json()
    parts = server.post("/v1/responses", {**body, "stream": True}).text.split("\n\n")
    data = [json.loads(part.partition("data: ")[2]) for part in parts if "data: " in part]
    assert [one["sequence_number"] for one in data] == list(range(len(data)))
    arguments = [one["delta"] for one in data if one["type"] == "response.function_call_arguments.delta"]
    assert "".join(arguments) == whole["output"][0]["arguments"]
    assert len(arguments) > 2
    added = next(one["item"] for one in data if one["type"] == "response.output_item.added")
    done = next(one["item"] for one in data if one["type"] == "response.output_item.done")
    assert added == {**done, "arguments": "", "status": "in_progress"}
    assert data[-1]["type"] == "response.completed"
    assert data[-1]["response"]["output"] == [done]


def test_the_text_before_a_call_has_its_own_logprobs_whole_and_streamed_alike(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'Yes.\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    monkeypatch.setattr(ChatTools, "constrain", lambda *_: Grammar(f"start: {json.dumps(text)}"))
    body = {**RESPONSE, "include": ["message.output_text.logprobs"]}
    whole = server.post("/v1/responses", body).json()["output"]
    parts = server.post("/v1/responses", {**body, "stream": True}).text.split("\n\n")
    streamed = json.loads(parts[-2].partition("data: ")[2])["response"]["output"]
    assert [item["type"] for item in whole] == ["message", "function_call"]
    assert [item.get("content") for item in streamed] == [item.get("content") for item in whole]
    (part,) = whole[0]["content"]
    assert part["text"] == "Yes."
    assert "".join(logprob["token"] for logprob in part["logprobs"]).strip() == "Yes."


def test_a_response_goes_on_from_the_result_of_its_call(server: Server) -> None:
    first = server.post(
        "/v1/responses", {**RESPONSE, "tool_choice": "required", "parallel_tool_calls": False}
    )
    call = first.json()["output"][0]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "no"}
    asked = {**RESPONSE, "max_output_tokens": 3, "tool_choice": "none"}
    kept = server.post(
        "/v1/responses", {**asked, "previous_response_id": first.json()["id"], "input": [result]}
    )
    assert kept.status_code == 200, kept.text
    items = [{"role": "user", "content": "Rain?"}, call, result]
    sent = server.post("/v1/responses", {**asked, "input": items})
    assert kept.json()["usage"]["input_tokens"] == sent.json()["usage"]["input_tokens"]
    assert kept.json()["output"][0]["content"] == sent.json()["output"][0]["content"]


def test_a_response_follows_the_format_of_its_text(server: Server) -> None:
    format_ = {"type": "json_schema", "name": "place", "schema": PARAMETERS, "strict": True}
    body = {key: value for key, value in RESPONSE.items() if key != "tools"}
    answer = server.post("/v1/responses", {**body, "text": {"format": format_}}).json()
    assert answer["text"]["format"] == format_
    jsonschema.validate(json.loads(answer["output"][0]["content"][0]["text"]), PARAMETERS)


# Refusals


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "rain"}}}, "tool_choice names 'rain'"),
        ({"tools": [function("a b")]}, "tools[0] has the name 'a b'"),
        ({"tools": [function("a", parameters={"type": "string"})]}, "not the schema of an object"),
        ({"tools": None, "tool_choice": "required"}, "there are no tools"),
        ({"tools": None, "parallel_tool_calls": True}, "parallel_tool_calls=True has no use without tools"),
        ({"json_schema": {}}, "contradicts tools that may be called"),
        (
            {"tool_choice": "required", "tools": [function("a", parameters={"not": {"$ref": "x"}})]},
            "refers to 'x', which is not within it",
        ),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_a_400_that_says_so(server: Server, asked: Any, message: str) -> None:
    response = server.post("/v1/chat/completions", {**CHAT, **asked})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
