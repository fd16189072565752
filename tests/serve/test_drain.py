"""What is under way in a server that drains: all work whose answer has not gone out whole."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from typing import Any

import pytest

from fastserve.serve import connection
from fastserve.serve.drain import Drain
from fastserve.serve.options import ServeOptions
from fastserve.serve.routes import tokenize
from serve.conftest import ADMIN_KEY, STORIES

pytest.importorskip("fastserve._native")

BODY = {"model": STORIES, "prompt": "He", "max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(make_server):
    return make_server(ServeOptions(admin_key_file="admin.txt"))


class FakeTransport(asyncio.Transport):
    """Of a client that takes nothing."""

    num_unsent_bytes = 0
    has_ended = False

    def get_write_buffer_size(self) -> int:
        return self.num_unsent_bytes

    def is_closing(self) -> bool:
        return self.has_ended

    def write(self, data: Any) -> None:
        self.num_unsent_bytes += len(data)


class Client:
    """Sends a request to an application, and takes its answer part by part."""

    def __init__(self, app: Any, path: str, body: Any, transport: asyncio.Transport | None = None) -> None:
        self.may_take = asyncio.Event()
        self.status: int | None = None
        self.taken = b""
        self._request = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [
                (b"host", b"localhost"),
                (b"content-type", b"application/json"),
                (b"x-api-key", ADMIN_KEY.encode()),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        if transport is not None:
            scope[connection._TRANSPORT] = transport
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        return self._request.pop() if self._request else await asyncio.Event().wait()

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        await self.may_take.wait()
        self.taken += message.get("body", b"")


async def drained(server) -> tuple[int, int]:
    """Requests under way, as a drain and as the status tell."""
    answer = await server.client.post("/admin/drain", json={"is_draining": False})
    status = await server.client.get("/admin/status")
    return answer.json()["num_requests"], status.json()["num_requests"]


def test_a_request_that_is_tokenized_is_under_way(server, monkeypatch) -> None:
    begun, may_end = threading.Event(), threading.Event()
    encode = tokenize.encode_prompt

    def encode_slowly(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert may_end.wait(30)
        return encode(*arguments, **options)

    monkeypatch.setattr(tokenize, "encode_prompt", encode_slowly)

    async def main() -> None:
        asked = asyncio.create_task(server.client.post("/tokenize", json={"model": STORIES, "prompt": "He"}))
        await asyncio.to_thread(begun.wait, 30)
        assert await drained(server) == (1, 1)
        may_end.set()
        assert (await asked).status_code == 200
        assert await drained(server) == (0, 0)

    server.run(main())


def test_a_stream_that_is_written_is_under_way_when_its_generation_has_ended(server) -> None:
    async def main() -> None:
        client = Client(server.app, "/v1/completions", {**BODY, "stream": True})
        while client.status is None or (await server.llm.status()).num_resident:
            await asyncio.sleep(0.01)
        assert server.llm.num_unfinished == 0
        assert await drained(server) == (1, 1)
        client.may_take.set()
        await client.task
        assert client.taken.endswith(b"data: [DONE]\n\n")
        assert await drained(server) == (0, 0)

    server.run(main())


def test_an_answer_that_has_not_left_its_connection_is_under_way(server) -> None:
    async def main() -> None:
        transport = FakeTransport()
        client = Client(server.app, "/v1/completions", BODY, transport)
        client.may_take.set()
        transport.num_unsent_bytes = 100
        await client.task
        assert client.status == 200
        assert await drained(server) == (1, 1)
        transport.num_unsent_bytes = 0
        assert await drained(server) == (0, 0)

    server.run(main())


@pytest.mark.parametrize("how", ["it has ended", "nobody has it"])
def test_a_connection_that_has_gone_has_nothing_under_way(how: str) -> None:
    drain, transport = Drain(), FakeTransport()
    transport.num_unsent_bytes = 5
    drain.begin()
    drain.end(transport)
    assert drain.num_under_way == 1
    if how == "it has ended":
        transport.has_ended = True
    else:
        del transport
        gc.collect()
    assert drain.num_under_way == 0


def test_a_response_in_the_background_is_under_way_until_it_ends(server) -> None:
    async def main() -> None:
        body = {"model": STORIES, "input": "He", "background": True, "max_output_tokens": 200}
        started = await server.client.post("/v1/responses", json=body)
        assert await drained(server) == (1, 1)
        path = f"/v1/responses/{started.json()['id']}"
        while (await server.client.get(path)).json()["status"] == "in_progress":
            await asyncio.sleep(0.01)
        assert await drained(server) == (0, 0)

    server.run(main())


def test_who_only_looks_and_who_is_refused_are_not_under_way(server) -> None:
    async def main() -> None:
        watching = asyncio.create_task(server.client.get("/admin/events?interval_seconds=60"))
        await asyncio.sleep(0.05)
        assert await drained(server) == (0, 0)
        await server.client.post("/admin/drain")
        assert (await server.client.post("/v1/completions", json=BODY)).status_code == 503
        assert await drained(server) == (0, 0)
        watching.cancel()

    server.run(main())
