"""/v1/messages in this process: what is streamed is what is answered whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastserve.serve.routes import messages
from fastserve.serve.schema.messages import Turn
from fastserve.serve.tools.parser import ArgumentsDelta, CallStart, TextDelta
from serve.conftest import STORIES

pytest.importorskip("fastserve._native")

MESSAGES = {"model": STORIES, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 24}


def events_of(response: Any) -> list[tuple[str, Any]]:
    """Names and data of a stream's events; comments left out."""
    events = []
    for text in response.text.split("\n\n"):
        if text and not text.startswith(":"):
            name, data = text.split("\n")
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in events)
    return events


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0, "stop_sequences": ["e", "xyz"]}])
def test_a_stream_joined_is_the_whole_answer(server, sampling) -> None:
    whole = server.post("/v1/messages", {**MESSAGES, **sampling}).json()
    streamed = events_of(server.post("/v1/messages", {**MESSAGES, **sampling, "stream": True}))
    names = [name for name, _ in streamed]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(data["delta"]["text"] for name, data in streamed if name == "content_block_delta")
    assert whole["content"] == [{"type": "text", "text": text}]
    start, end = streamed[0][1]["message"], streamed[-2][1]
    assert end["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence")}
    assert {**start["usage"], **end["usage"]} == whole["usage"]


def test_text_between_two_calls_is_a_block_of_its_own() -> None:
    events = [
        CallStart(0, "add"),
        ArgumentsDelta(0, '{"a": 1}'),
        TextDelta("and"),
        CallStart(1, "add"),
        ArgumentsDelta(1, '{"a": 2}'),
    ]
    blocks = messages._to_blocks(events)
    assert [block.get("input", block.get("text")) for block in blocks] == [{"a": 1}, "and", {"a": 2}]


@pytest.mark.parametrize("arguments", ['{"a": "\\ud83d"}', '{"a": NaN}', '{"a": 1e999}', '{"a'])
def test_arguments_that_could_not_be_written_are_none(arguments: str) -> None:
    (block,) = messages._to_blocks([CallStart(0, "add"), ArgumentsDelta(0, arguments)])
    assert block["input"] == {}


def test_a_turn_without_blocks_is_refused(server) -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    body = {"model": STORIES, "messages": [{"role": "user", "content": []}], "tools": tools}
    assert server.post("/v1/messages/count_tokens", body).status_code == 400


def test_the_answer_says_which_stop_sequence_ended_it(server) -> None:
    body = {**MESSAGES, "temperature": 0, "stop_sequences": ["xyz", "e"]}
    answer = server.post("/v1/messages", body).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "e")
    assert "e" not in answer["content"][0]["text"]


def test_an_answer_that_is_cut_says_so(server) -> None:
    answer = server.post("/v1/messages", {**MESSAGES, "max_tokens": 2}).json()
    assert (answer["stop_reason"], answer["usage"]["output_tokens"]) == ("max_tokens", 2)


def test_a_conversation_with_calls_of_tools_is_read_turn_by_turn(server) -> None:
    call = {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Bern"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "Sunny."}]}
    turns = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
    ]
    conversation = {"model": STORIES, "system": "Be brief.", "messages": turns}
    told = '{"name": "weather", "arguments": {"city": "Bern"}}'  # as the template knows of no tools
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": f"I look.\n<tool_call>\n{told}\n</tool_call>"},
        {"role": "tool", "content": "Sunny.", "tool_call_id": "1"},
        {"role": "user", "content": "Well?"},
    ]
    counted = server.post("/v1/messages/count_tokens", conversation).json()["input_tokens"]
    usage = server.post(
        "/v1/chat/completions", {"model": STORIES, "messages": plain, "max_tokens": 1}
    ).json()["usage"]
    assert counted == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"container": "x"}, "container"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
    ],
)
def test_a_field_that_is_wrong_is_named(server, wrong, param) -> None:
    response = server.post("/v1/messages", {**MESSAGES, **wrong})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


def test_anthropics_client_reads_answers_and_streams(server) -> None:
    anthropic = pytest.importorskip("anthropic")
    httpx2 = pytest.importorskip("httpx2")
    client = anthropic.AsyncAnthropic(
        api_key="none",
        base_url="http://localhost",
        http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(app=server.app)),
        max_retries=0,
    )

    async def converse() -> tuple[str, str, int]:
        whole = await client.messages.create(**MESSAGES, extra_body={"temperature": 0})
        async with client.messages.stream(**MESSAGES, extra_body={"temperature": 0}) as stream:
            streamed = await stream.get_final_text()
        counted = await client.messages.count_tokens(model=MESSAGES["model"], messages=MESSAGES["messages"])
        assert whole.usage.input_tokens == counted.input_tokens
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            await client.messages.create(**{**MESSAGES, "max_tokens": 0})
        return whole.content[0].text, streamed, whole.usage.output_tokens

    whole, streamed, num_tokens = server.run(converse())
    assert whole == streamed
    assert num_tokens == MESSAGES["max_tokens"]


def test_the_model_is_told_of_a_tool_that_failed() -> None:
    block = {"type": "tool_result", "tool_use_id": "1", "content": "no such city", "is_error": True}
    (message,) = Turn.model_validate({"role": "user", "content": [block]}).to_template()
    assert message["content"] == "Error: no such city"


def test_an_answer_that_is_begun_for_the_assistant_is_refused(server) -> None:
    turns = [*MESSAGES["messages"], {"role": "assistant", "content": "Once"}]
    error = server.post("/v1/messages", {**MESSAGES, "messages": turns}).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "invalid_value")
    counted = {"model": STORIES, "messages": turns}
    assert server.post("/v1/messages/count_tokens", counted).json()["input_tokens"] > 0
