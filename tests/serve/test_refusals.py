"""What is wrong with a request is named: field, value, range; and nothing is ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastserve.config import EngineOptions
from fastserve.serve.options import ServeOptions
from serve.conftest import OPTIONS, STORIES

pytest.importorskip("fastserve._native")

CHAT = {"model": STORIES, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
PATH = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"temperature": 101},
            "temperature",
            "temperature=101.0 is out of range (hint: choose a number of at ",
        ),
        ({"temperature": "1"}, "temperature", "temperature='1': "),
        ({"top_p": 0}, "top_p", "above 0 and at most 1"),
        ({"n": 0}, "n", "n=0 is out of range (hint: choose a whole number of at least 1)"),
        ({"n": 17}, "n", "n asks for 17; the most is 16"),
        ({"n": 1.5}, "n", "n=1.5: "),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0 is out of range"),
        ({"max_tokens": True}, "max_tokens", "max_tokens=True: "),
        ({"max_completion_tokens": 5}, "max_tokens", "max_completion_tokens=5 and max_tokens=4 differ"),
        ({"seed": -1}, "seed", "seed=-1 is out of range"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs=21 is out of range"),
        ({"top_logprobs": 2}, "top_logprobs", "has no use without logprobs=true"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias names 'x', which is no token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias[1]", "logit_bias[1]=101.0 is out of range"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "outside the model's vocabulary of 512"),
        ({"stop": [""]}, "stop", "stop holds ''"),
        ({"stop": ["a"] * 17}, "stop", "stop asks for 17; the most is 16"),
        ({"timeout_ms": 0}, "timeout_ms", "timeout_ms=0.0 is out of range"),
        ({"priority_class": "urgent"}, "priority_class", "priority_class='urgent' is unknown"),
        ({"functions": []}, "functions", "functions is not supported"),
        ({"messages": []}, "messages", "messages=[]: "),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "messages[0].role='robot'"),
        ({"messages": [{"role": "user", "mood": 1}]}, "messages[0].mood", "is not supported"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "stream_options.x is not supported"),
    ],
)
def test_a_field_that_is_wrong_is_named(server, fields: dict[str, Any], param: str, message: str) -> None:
    response = server.post(PATH, {**CHAT, **fields})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_missing_field_is_named(server) -> None:
    response = server.post(PATH, {"model": STORIES})
    assert response.json()["error"]["message"] == "messages is missing"


@pytest.mark.parametrize("stream", [False, True])
def test_a_context_that_overflows_is_told_with_both_counts(server, stream: bool) -> None:
    body = {"model": STORIES, "prompt": [1] * 200, "max_tokens": 100, "stream": stream}
    response = server.post("/v1/completions", body)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "200 tokens" in message
    assert "the context is 256" in message


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "missing_body"),
        (b"{", "invalid_json"),
        (b"[1]", "invalid_value"),
        (b"[" * 100_000, None),
        (b"[" * 101 + b"]" * 101, "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"model": "\xed\xa0\x80"}', "invalid_json"),
        ('{"model": "m"}'.encode("utf-16"), "invalid_json"),
    ],
)
def test_a_body_that_is_no_object_is_refused(server, body: bytes, code: str | None) -> None:
    response = server.run(
        server.client.post(PATH, content=body, headers={"content-type": "application/json"})
    )
    assert response.status_code == 400
    assert code is None or response.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v2", 404, "not_found"), ("GET", PATH, 405, "method_not_allowed"), ("PUT", PATH, 405, None)],
)
def test_an_address_or_method_that_is_not_there_is_an_error_object(
    server, method: str, path: str, status: int, code: str | None
) -> None:
    response = server.run(server.client.request(method, path))
    assert response.status_code == status
    assert code is None or response.json()["error"]["code"] == code


def test_a_generator_does_not_embed(server) -> None:
    response = server.post("/v1/embeddings", {"model": STORIES, "input": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_model"


def test_work_that_never_fits_the_kv_memory_is_refused_on_arrival(make_server) -> None:
    server = make_server(engine=EngineOptions(threads=1, context_length=256, kv_memory="64KiB"))
    blocks = server.llm.model.executable.limits.num_blocks
    tokens = blocks * server.llm.model.executable.block_size
    assert tokens < 250
    response = server.post(
        "/v1/completions", {"model": STORIES, "prompt": [5] * tokens, "max_tokens": 256 - tokens}
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "kv_memory_exceeded"


def test_a_body_beyond_its_limit_is_refused_by_what_it_says_and_by_what_comes(make_server) -> None:
    server = make_server(ServeOptions(max_body=1000))
    response = server.post(PATH, {**CHAT, "user": "u" * 1000})
    assert response.status_code == 413
    assert "max_body is 1000" in response.json()["error"]["message"]

    async def parts():
        for _ in range(20):
            yield b" " * 100

    response = server.run(server.client.post(PATH, content=parts()))
    assert response.status_code == 413


def test_a_prompt_beyond_the_servers_own_limit_is_refused(make_server) -> None:
    server = make_server(ServeOptions(max_prompt_tokens=10))
    response = server.post("/v1/completions", {"model": STORIES, "prompt": [5] * 11})
    assert "the prompt has 11 tokens; max_prompt_tokens is 10" in response.json()["error"]["message"]


def test_a_full_queue_is_a_429_that_says_when_to_come_again(make_server) -> None:
    import asyncio

    server = make_server(engine=replace(OPTIONS, max_waiting=1, max_sequences=1))
    body = {"model": STORIES, "prompt": "He", "max_tokens": 150, "ignore_eos": True}

    async def main() -> list[Any]:
        return await asyncio.gather(*(server.client.post("/v1/completions", json=body) for _ in range(8)))

    responses = server.run(main())
    refused = [response for response in responses if response.status_code == 429]
    assert refused
    assert len(refused) < 8
    assert {response.status_code for response in responses} == {200, 429}
    for response in refused:
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"foo-bar": 1}, "foo-bar"),
        ({"str": 1}, "str"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_a_field_is_named_as_the_body_has_it(server, fields: dict[str, Any], param: str) -> None:
    body = {"model": STORIES, "messages": [{"role": "user", "content": "x"}], **fields}
    response = server.post("/v1/chat/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
TOOL = {"name": "now", "parameters": SCHEMA}
CHAT_TOOL = {"type": "function", "function": TOOL}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
TEXT_FORMAT = {"type": "json_schema", "name": "a", "schema": SCHEMA}
LONG = "word " * 2000
LONG_TURN = [{"role": "user", "content": LONG}]
TURN = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (PATH, {"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        (PATH, {"stop_token_ids": [1] * 17}, "stop_token_ids"),
        (PATH, {"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens"),
        (PATH, {"messages": LONG_TURN}, "messages"),
        (PATH, {"max_tokens": 300}, "messages"),
        (PATH, {"json_schema": SCHEMA}, "json_schema"),
        (PATH, {"regex": "("}, "regex"),
        (PATH, {"choice": []}, "choice"),
        (PATH, {"grammar": "nothing"}, "grammar"),
        (PATH, {"response_format": RESPONSE_FORMAT}, "response_format"),
        (PATH, {"regex": "a", "ignore_eos": True}, "ignore_eos"),
        (PATH, {"tools": [CHAT_TOOL], "tool_choice": "required"}, "tools"),
        (PATH, {"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools[0]"),
        (PATH, {"tools": [CHAT_TOOL, CHAT_TOOL]}, "tools"),
        (PATH, {"tool_choice": "required"}, "tool_choice"),
        ("/v1/completions", {"prompt": "a", "regex": "("}, "regex"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": [512]}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 257}, "prompt"),
        ("/v1/responses", {"input": LONG}, "input"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 300}, "input"),
        ("/v1/responses", {"input": "a", "text": {"format": TEXT_FORMAT}}, "text.format"),
        (
            "/v1/responses",
            {"input": "a", "tools": [{"type": "function", **TOOL}], "tool_choice": "required"},
            "tools",
        ),
        ("/v1/messages", {"messages": LONG_TURN, "max_tokens": 1}, "messages"),
        ("/v1/messages", {"messages": TURN, "max_tokens": 0}, "max_tokens"),
        (
            "/v1/messages",
            {"messages": TURN, "max_tokens": 1, "stop_sequences": ["a"] * 17},
            "stop_sequences",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_behind_the_schema_names_its_field_too(
    server, path: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    base = CHAT if path == PATH else {"model": STORIES}
    assert_refused(server.post(path, {**base, **fields, "stream": stream}), param)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (PATH, {**CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/messages/count_tokens", {"messages": LONG_TURN}, "messages"),
        ("/tokenize", {"prompt": LONG}, "prompt"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
    ],
)
def test_so_does_what_has_no_stream(server, path: str, fields: dict[str, Any], param: str) -> None:
    assert_refused(server.post(path, {"model": STORIES, **fields}), param)


def assert_refused(response: Any, param: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error"


def test_messages_without_tokens_are_no_prompt(server, monkeypatch) -> None:
    monkeypatch.setattr("fastserve.serve.chat_prompt.encode_chat", lambda *_, **__: [])
    error = server.post(PATH, CHAT).json()["error"]
    assert (error["param"], error["message"]) == (
        "messages",
        "the prompt has no tokens (hint: give at least one character)",
    )


def test_a_tenant_that_is_not_served_is_a_user_that_is_not(make_server) -> None:
    server = make_server(engine=replace(OPTIONS, tenant_weights={"alice": 1}, unknown_tenants="refuse"))
    error = server.post(PATH, {**CHAT, "user": "bob"}).json()["error"]
    assert (error["param"], error["message"][:22]) == ("user", "user 'bob' is unknown:")
    body = {"model": STORIES, "max_tokens": 1, "messages": CHAT["messages"], "metadata": {"user_id": "bob"}}
    assert server.post("/v1/messages", body).json()["error"]["param"] == "metadata.user_id"
    assert server.post(PATH, {**CHAT, "user": "alice"}).status_code == 200


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "-Infinity", "1e999", "9" * 400 + ".0"])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_what_could_not_be_written_again_is_refused(server, path: str, value: str) -> None:
    tool = f'{{"type": "function", "name": "f", "parameters": {{"x": {value}}}}}'
    body = f'{{"model": "{STORIES}", "input": "x", "messages": [], "tools": [{tool}]}}'
    response = server.run(
        server.client.post(path, content=body, headers={"content-type": "application/json"})
    )
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert response.json()["error"]["param"] == "tools[0].parameters.x"


@pytest.mark.parametrize("depth", [200, 600, 900, 5000])
@pytest.mark.parametrize(
    "body",
    [
        '{"model": "stories", "messages": %s}',
        '{"model": "stories", "messages": [{"role": "user", "content": %s}]}',
        '{"model": "stories", "messages": [{"role": "user", "content": "NaN"}], "tools": %s}',
        '{"model": "stories", "max_tokens": 1, "messages": [{"role": "assistant", "tool_calls": [{"id": "1", '
        '"type": "function", "function": {"name": "f", "arguments": "%s"}}]}]}',
    ],
)
def test_what_is_nested_deeply_is_refused_or_taken(server, body: str, depth: int) -> None:
    content = (body % ("[" * depth + "]" * depth)).encode()
    headers = {"content-type": "application/json"}
    response = server.run(server.client.post(PATH, content=content, headers=headers))
    assert response.status_code in (200, 400), response.text


def test_names_that_are_kept_and_logged_are_not_long(server) -> None:
    for field in ("user", "session"):
        assert_refused(server.post(PATH, {**CHAT, field: "x" * 513}), field)
        assert server.post(PATH, {**CHAT, field: "x" * 512}).status_code == 200


def test_a_conversation_without_messages_is_refused_with_tools_too(server) -> None:
    tools = [{"type": "function", "name": "f"}]
    assert_refused(server.post("/v1/responses", {"model": STORIES, "input": [], "tools": tools}), "input")
