"""Constraints over HTTP: what is answered is what was asked for, streamed or not."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from serve.conftest import STORIES, events

pytest.importorskip("fastserve._native")

CHAT = {"model": STORIES, "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 150, "seed": 3}
PROMPT = {"model": STORIES, "prompt": "Once", "max_tokens": 100, "seed": 3}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NAMED_SCHEMA = {"name": "person", "schema": SCHEMA, "strict": True}


def content_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_schema", "json_schema": NAMED_SCHEMA}},
        {"json_schema": SCHEMA},
    ],
    ids=["response_format", "json_schema"],
)  # fmt: skip
def test_an_answer_follows_its_schema(server: Any, asked: Any, seed: int) -> None:
    content = content_of(server.post("/v1/chat/completions", {**CHAT, **asked, "seed": seed}))
    jsonschema.validate(json.loads(content), SCHEMA)


def test_any_object_may_be_asked_for(server: Any) -> None:
    body = {**CHAT, "response_format": {"type": "json_object"}, "logit_bias": {}, "temperature": 0.3}
    response = server.post("/v1/chat/completions", body)
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[a-c]{3}x"}, "[a-c]{3}x"),
        ({"choice": ["up", "down"]}, "up|down"),
        ({"grammar": 'start: "a" start "b" | "c"'}, "a*cb*"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_texts_follow_patterns_choices_and_grammars(server: Any, path: str, asked: Any, pattern: str) -> None:
    body = {**(CHAT if "chat" in path else PROMPT), **asked}
    assert re.fullmatch(pattern, content_of(server.post(path, body)))


def test_a_stream_joined_is_the_whole_answer(server: Any) -> None:
    body = {**CHAT, "json_schema": SCHEMA}
    *data, done = events(server.post("/v1/chat/completions", {**body, "stream": True}))
    assert done == "[DONE]"
    deltas = [choice["delta"] for text in data for choice in json.loads(text)["choices"]]
    joined = "".join(delta.get("content") or "" for delta in deltas)
    assert joined == content_of(server.post("/v1/chat/completions", body))


def test_all_completions_of_a_prompt_follow_it(server: Any) -> None:
    response = server.post("/v1/completions", {**PROMPT, "regex": "(yes|no)", "n": 4, "temperature": 2.0})
    assert {choice["text"] for choice in response.json()["choices"]} <= {"yes", "no"}
    assert len(response.json()["choices"]) == 4


def test_text_is_text(server: Any) -> None:
    plain = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 9})
    asked = server.post(
        "/v1/chat/completions", {**CHAT, "max_tokens": 9, "response_format": {"type": "text"}}
    )
    assert asked.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"regex": "a", "choice": ["b"]}, "regex and choice cannot be followed together"),
        ({"regex": "(?=a)"}, "the pattern cannot be compiled"),
        ({"json_schema": {"type": "array", "items": {}, "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"$ref": "http://example.org/a.json"}}, "not within it"),
        ({"json_schema": {"enum": ["x" * 131_072]}}, "characters; the limit is 131072"),
        ({"grammar": "start: missing"}, "the grammar cannot be compiled"),
        ({"choice": []}, "are not texts to choose from"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"regex": "a", "ignore_eos": True}, "contradicts a constraint"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_followed_is_a_400_that_says_why(
    server: Any, asked: Any, message: str, stream: bool
) -> None:
    response = server.post("/v1/chat/completions", {**CHAT, **asked, "stream": stream})
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["code"] in ("invalid_constraint", "invalid_value")
