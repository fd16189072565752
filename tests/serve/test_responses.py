"""/v1/responses in this process: what is streamed is what is answered whole, and conversations go on."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from typing import Any

import pytest

from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.key_file import digest_of
from fastserve.serve.options import ServeOptions
from fastserve.serve.response_output import ResponseOutput
from serve.conftest import STORIES
from serve.test_messages import events_of
from serve.test_stream import Call, wait_until_idle

pytest.importorskip("fastserve._native")

ASKED = {"model": STORIES, "input": "Tell me a story.", "max_output_tokens": 24, "temperature": 0}


def answer_of(response: Any) -> str:
    (item,) = response["output"]
    (part,) = item["content"]
    return part["text"]


def without_ids(response: Any) -> Any:
    """What two responses to one request have in common."""
    (item,) = response["output"]
    usage = {key: response["usage"][key] for key in ("input_tokens", "output_tokens")}
    return response["status"], {**item, "id": None}, usage


@pytest.mark.parametrize("sampling", [{}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}])
def test_a_stream_joined_is_the_whole_answer(server, sampling) -> None:
    whole = server.post("/v1/responses", {**ASKED, **sampling}).json()
    streamed = events_of(server.post("/v1/responses", {**ASKED, **sampling, "stream": True}))
    assert [data["sequence_number"] for _, data in streamed] == list(range(len(streamed)))
    deltas = [data for name, data in streamed if name == "response.output_text.delta"]
    assert "".join(delta["delta"] for delta in deltas) == answer_of(whole)
    logprobs = [lp for delta in deltas for lp in delta["logprobs"]]
    assert logprobs == whole["output"][0]["content"][0]["logprobs"]
    name, last = streamed[-1]
    assert name == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert without_ids(last["response"]) == without_ids(whole)


def test_a_conversation_goes_on_from_a_response(server) -> None:
    first = server.post("/v1/responses", {**ASKED, "instructions": "Be brief."}).json()
    second = server.post(
        "/v1/responses", {**ASKED, "input": "And then?", "previous_response_id": first["id"]}
    ).json()
    spelled_out = [
        {"role": "user", "content": ASKED["input"]},
        {"role": "assistant", "content": [{"type": "output_text", "text": answer_of(first)}]},
        {"role": "user", "content": "And then?"},
    ]
    assert without_ids(second) == without_ids(
        server.post("/v1/responses", {**ASKED, "input": spelled_out}).json()
    )


def test_a_response_is_kept_until_it_is_deleted(server) -> None:
    response = server.post("/v1/responses", {**ASKED, "metadata": {"of": "test"}}).json()
    path = f"/v1/responses/{response['id']}"
    assert server.get(path).json() == response
    assert server.run(server.client.delete(path)).json()["deleted"] is True
    assert server.get(path).status_code == 404
    kept_not = server.post("/v1/responses", {**ASKED, "store": False}).json()
    assert server.get(f"/v1/responses/{kept_not['id']}").json()["error"]["code"] == "response_not_found"


def test_the_oldest_goes_where_there_are_too_many(make_server) -> None:
    server = make_server(ServeOptions(max_responses=2))
    ids = [server.post("/v1/responses", {**ASKED, "max_output_tokens": 1}).json()["id"] for _ in range(3)]
    assert [server.get(f"/v1/responses/{id_}").status_code for id_ in ids] == [404, 200, 200]


def test_a_response_is_seen_by_its_owner_alone(make_server) -> None:
    server = make_server(keys=ApiKeys({"alice": digest_of("a"), "bob": digest_of("b")}))
    alice, bob = ({"authorization": f"Bearer {key}"} for key in ("a", "b"))
    response = server.post("/v1/responses", ASKED, headers=alice).json()
    path = f"/v1/responses/{response['id']}"
    assert [server.get(path, headers=who).status_code for who in (alice, bob)] == [200, 404]
    following = {**ASKED, "previous_response_id": response["id"]}
    assert server.post("/v1/responses", following, headers=bob).status_code == 404


def test_one_in_the_background_is_retrieved_later(server) -> None:
    expected = server.post("/v1/responses", ASKED).json()
    started = server.post("/v1/responses", {**ASKED, "background": True}).json()
    assert (started["status"], started["output"]) == ("in_progress", [])
    response = started
    while response["status"] == "in_progress":
        response = server.get(f"/v1/responses/{started['id']}").json()
    assert without_ids(response) == without_ids(expected)


LONG = {**ASKED, "max_output_tokens": 200, "ignore_eos": True}


@pytest.fixture
def has_begun(monkeypatch) -> asyncio.Event:
    """Set when a response has some tokens."""
    event, count = asyncio.Event(), itertools.count(1)
    take = ResponseOutput.take

    def count_take(*arguments: Any, **options: Any) -> Any:
        if next(count) == 5:
            event.set()
        return take(*arguments, **options)

    monkeypatch.setattr(ResponseOutput, "take", count_take)
    return event


def test_one_in_the_background_that_is_cancelled_keeps_what_it_has(server, has_begun) -> None:
    async def main() -> tuple[Any, Any]:
        started = (await server.client.post("/v1/responses", json={**LONG, "background": True})).json()
        await has_begun.wait()
        path = f"/v1/responses/{started['id']}"
        cancelled = (await server.client.post(f"{path}/cancel")).json()
        await wait_until_idle(server.llm)
        assert (await server.client.get(path)).json() == cancelled
        assert (await server.client.post(f"{path}/cancel")).json() == cancelled
        return started, cancelled

    started, cancelled = server.run(main())
    assert (cancelled["status"], cancelled["error"]) == ("cancelled", None)
    assert cancelled["output"][0]["status"] == "incomplete"
    whole = server.post("/v1/responses", LONG).json()
    assert 0 < len(answer_of(cancelled)) < len(answer_of(whole))
    assert answer_of(whole).startswith(answer_of(cancelled))
    following = server.post("/v1/responses", {**ASKED, "previous_response_id": started["id"]})
    assert following.json()["error"]["param"] == "previous_response_id"


def test_a_stream_that_is_cancelled_ends_with_what_it_has(server, has_begun) -> None:
    async def main() -> tuple[str, Any]:
        call = Call(server.app, {**LONG, "stream": True}, path="/v1/responses")
        task = asyncio.create_task(call.run())
        await has_begun.wait()
        created = json.loads(call.text.split("data: ")[1].split("\n")[0])
        path = f"/v1/responses/{created['response']['id']}"
        cancelled = (await server.client.post(f"{path}/cancel")).json()
        await task
        assert (await server.client.get(path)).json() == cancelled
        return call.text, cancelled

    text, cancelled = server.run(main())
    streamed = [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line[:4] == "data"]
    assert [data["sequence_number"] for data in streamed] == list(range(len(streamed)))
    deltas = [data["delta"] for data in streamed if data["type"] == "response.output_text.delta"]
    assert "".join(deltas) == answer_of(cancelled)
    assert [data["type"] for data in streamed[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert streamed[-1]["response"] == cancelled
    assert cancelled["status"] == "cancelled"


@pytest.mark.parametrize("background", [False, True])
def test_one_that_fails_keeps_what_it_has(server, has_begun, monkeypatch, background: bool) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a kernel failed")

    async def main() -> Any:
        mode = "background" if background else "stream"
        call = Call(server.app, {**LONG, mode: True}, path="/v1/responses")
        task = asyncio.create_task(call.run())
        await has_begun.wait()
        monkeypatch.setattr(server.llm._worker._engine, "_run", fail)
        await task
        first = json.loads(call.text if background else call.text.split("data: ")[1].split("\n")[0])
        path = f"/v1/responses/{first['id'] if background else first['response']['id']}"
        response = (await server.client.get(path)).json()
        while response["status"] == "in_progress":
            await asyncio.sleep(0.001)
            response = (await server.client.get(path)).json()
        return response

    response = server.run(main())
    assert (response["status"], response["error"]["code"]) == ("failed", "step_failed")
    assert answer_of(response)


def test_one_in_the_background_has_its_line_when_it_has_ended(server, caplog) -> None:
    def lines() -> list[Any]:
        return [record.fields for record in caplog.records if record.getMessage() == "request"]

    async def main() -> list[Any]:
        started = (await server.client.post("/v1/responses", json={**LONG, "background": True})).json()
        early = lines()
        path = f"/v1/responses/{started['id']}"
        while (await server.client.get(path)).json()["status"] == "in_progress":
            await asyncio.sleep(0.001)
        return early

    with caplog.at_level(logging.INFO, "fastserve.serve.request"):
        assert not server.run(main())
    posted = [fields for fields in lines() if fields["method"] == "POST"]
    (line,) = posted
    assert (line["status"], line["response_status"], line["completion_tokens"]) == (200, "incomplete", 200)
    assert line["model"] == STORIES


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "store"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"previous_response_id": "resp_no"}, "previous_response_id"),
    ],
)
def test_a_field_that_is_wrong_is_named(server, wrong, param) -> None:
    response = server.post("/v1/responses", {**ASKED, **wrong})
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"].startswith(param), response.text


def test_openais_client_reads_answers_and_streams(server) -> None:
    openai = pytest.importorskip("openai")
    httpx2 = pytest.importorskip("httpx2")
    client = openai.AsyncOpenAI(
        api_key="none",
        base_url="http://localhost/v1",
        http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(app=server.app)),
        max_retries=0,
    )

    async def converse() -> tuple[str, str]:
        whole = await client.responses.create(**ASKED)
        async for event in await client.responses.create(**ASKED, stream=True):
            if event.type == "response.incomplete":
                streamed = event.response
        assert (await client.responses.retrieve(whole.id)).output_text == whole.output_text
        assert whole.usage.input_tokens_details.cached_tokens <= whole.usage.input_tokens
        started = await client.responses.create(**ASKED, background=True)
        assert (await client.responses.cancel(started.id)).id == started.id
        await client.responses.delete(whole.id)
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            await client.responses.retrieve(whole.id)
        return whole.output_text, streamed.output_text

    whole, streamed = server.run(converse())
    assert whole == streamed
