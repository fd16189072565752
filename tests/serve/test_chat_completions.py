"""/v1/chat/completions in this process: what is streamed is what is answered whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.conftest import STORIES, events

pytest.importorskip("fastserve._native")

CHAT = {"model": STORIES, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 24}


def chunks_of(response: Any) -> list[Any]:
    *data, done = events(response)
    assert done == "[DONE]"
    return [json.loads(text) for text in data]


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"seed": 7}, {"seed": 3, "top_p": 0.8, "stop": "e"}]
)
def test_a_stream_joined_is_the_whole_answer(server, sampling) -> None:
    whole = server.post("/v1/chat/completions", {**CHAT, **sampling})
    assert whole.status_code == 200, whole.text
    streamed = chunks_of(server.post("/v1/chat/completions", {**CHAT, **sampling, "stream": True}))
    (choice,) = whole.json()["choices"]
    assert text_of(streamed) == choice["message"]["content"]
    assert streamed[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_usage_counts_tokens_and_ends_a_stream_that_asks_for_it(server) -> None:
    whole = server.post("/v1/chat/completions", {**CHAT, "temperature": 0}).json()
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    body = {**CHAT, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chunks_of(server.post("/v1/chat/completions", body))
    assert (last["choices"], last["usage"]) == ([], usage)
    assert {chunk["usage"] for chunk in chunks} == {None}


def test_a_field_that_is_not_there_is_refused_by_name(server) -> None:
    response = server.post("/v1/chat/completions", {**CHAT, "modalities": ["audio"]})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (
        400,
        "modalities",
        "unsupported_parameter",
    )


def test_an_unknown_model_is_a_404_that_names_those_there_are(server) -> None:
    response = server.post("/v1/chat/completions", {**CHAT, "model": "gpt-5"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert STORIES in response.json()["error"]["message"]


def test_an_answer_may_be_sent_back_as_it_came(server) -> None:
    answer = server.post("/v1/chat/completions", {**CHAT, "temperature": 0}).json()["choices"][0]["message"]
    turns = [*CHAT["messages"], answer, {"role": "user", "content": "Go on."}]
    response = server.post("/v1/chat/completions", {**CHAT, "messages": turns})
    assert response.status_code == 200, response.text
