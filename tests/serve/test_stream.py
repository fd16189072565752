"""Streams: comments while nothing comes, clients that go, errors before and after the first byte."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fastserve.engine.worker import Hold
from fastserve.serve.options import ServeOptions
from serve.conftest import STORIES

pytest.importorskip("fastserve._native")

PATH = "/v1/completions"
LONG = {"model": STORIES, "prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True}


class Call:
    """One request straight to the application, whose client may go away or take nothing."""

    def __init__(self, app: Any, body: Any, *, transport: Any = None, path: str = PATH) -> None:
        self._app = app
        self._transport = transport
        self._path = path
        self._body = json.dumps(body).encode()
        self._is_sent = False
        self.sent: list[Any] = []
        self.gone = asyncio.Event()
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.has_written = asyncio.Event()

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        if self._transport is not None:
            scope["fastserve.transport"] = self._transport
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> Any:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self.has_written.set()
        await self.may_write.wait()


async def wait_until_idle(llm: Any) -> None:
    """Until nothing runs; all blocks are free then."""
    async with asyncio.timeout(20):
        status = await llm.status()
        while status.num_waiting or status.num_resident:
            await asyncio.sleep(0.01)
            status = await llm.status()
    assert status.num_free_blocks == status.num_blocks


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", ["at once", "after a token"])
def test_a_client_that_goes_away_frees_everything(server, stream: bool, moment: str) -> None:
    async def main() -> None:
        call = Call(server.app, {**LONG, "n": 8, "stream": stream})
        task = asyncio.create_task(call.run())
        if moment == "after a token":
            while not (await server.llm.status()).num_resident:
                await asyncio.sleep(0.001)
            if stream:
                await call.has_written.wait()
        call.gone.set()
        await task
        await wait_until_idle(server.llm)
        completed = [m for m in call.sent if m["type"] == "http.response.start" and m["status"] == 200]
        assert stream or not completed

    server.run(main())


def test_tokens_of_a_client_that_goes_away_are_counted(make_server) -> None:
    server = make_server()

    async def main() -> None:
        call = Call(server.app, {**LONG, "stream": True})
        task = asyncio.create_task(call.run())
        while call.text.count("data: ") < 5:
            await call.has_written.wait()
            await asyncio.sleep(0.001)
        call.gone.set()
        await task

    server.run(main())
    count = 'fastserve_completion_tokens_total{model="stories"} '
    assert 3 <= float(server.get("/metrics").text.split(count)[1].split()[0]) < LONG["max_tokens"]


def test_a_stream_without_chunks_is_kept_alive(make_server, monkeypatch) -> None:
    server = make_server(ServeOptions(keep_alive_seconds=0.05))

    async def main() -> None:
        call = Call(server.app, {**LONG, "stream": True})
        submit = server.llm.submit

        async def submit_held(*arguments: Any, **options: Any) -> Any:
            stream = await submit(*arguments, **options)
            server.llm._worker.send(Hold(stream._ticket, True))
            return stream

        monkeypatch.setattr(server.llm, "submit", submit_held)
        task = asyncio.create_task(call.run())
        async with asyncio.timeout(20):
            while call.text.count(": keep-alive\n\n") < 3:
                await asyncio.sleep(0.01)
        call.gone.set()
        await task
        await wait_until_idle(server.llm)

    server.run(main())


class Transport:
    """A connection whose client takes everything."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False


def test_a_stream_that_pauses_is_kept_alive_on_a_connection_of_its_own(make_server) -> None:
    server = make_server(ServeOptions(keep_alive_seconds=0.05))

    async def main() -> None:
        transport = Transport()
        call = Call(server.app, {**LONG, "stream": True}, transport=transport)
        task = asyncio.create_task(call.run())
        async with asyncio.timeout(20):
            while not transport.data:
                await asyncio.sleep(0.001)
            ticket = next(iter(server.llm._streams))
            server.llm._worker.send(Hold(ticket, True))
            while ": keep-alive" not in call.text:
                await asyncio.sleep(0.01)
        call.gone.set()
        await task
        await wait_until_idle(server.llm)

    server.run(main())


def test_a_response_whose_client_takes_nothing_more_has_failed(make_server) -> None:
    server = make_server(ServeOptions(write_seconds=0.1))

    async def main() -> str:
        body = {"model": STORIES, "input": "Once", "max_output_tokens": 200, "stream": True}
        call = Call(server.app, {**body, "ignore_eos": True}, path="/v1/responses")
        task = asyncio.create_task(call.run())
        async with asyncio.timeout(20):
            while len(call.sent) < 2:
                await asyncio.sleep(0)
            call.may_write.clear()
            await task
        await wait_until_idle(server.llm)
        data = call.sent[1]["body"].decode().split("data: ")[1].split("\n")[0]
        return json.loads(data)["response"]["id"]

    assert server.get(f"/v1/responses/{server.run(main())}").json()["status"] == "failed"


def test_a_client_that_takes_nothing_is_cut_off(make_server) -> None:
    server = make_server(ServeOptions(write_seconds=0.1))

    async def main() -> None:
        call = Call(server.app, {**LONG, "stream": True})
        call.may_write.clear()
        await asyncio.wait_for(call.run(), 20)
        await wait_until_idle(server.llm)

    server.run(main())


def test_a_failure_before_the_first_byte_has_its_status(server, monkeypatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(server.llm._worker._engine, "_run", fail)
    for stream in (True, False):
        response = server.post(PATH, {**LONG, "stream": stream})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "step_failed"
        assert "a kernel failed" in response.json()["error"]["message"]


def test_a_failure_after_the_first_byte_ends_the_stream_with_an_error_event(server, monkeypatch) -> None:
    async def main() -> None:
        call = Call(server.app, {**LONG, "stream": True})
        task = asyncio.create_task(call.run())
        await call.has_written.wait()

        def fail(*_: Any) -> Any:
            raise RuntimeError("a kernel failed")

        monkeypatch.setattr(server.llm._worker._engine, "_run", fail)
        await task
        last = call.text.split("\n\n")[-2]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "step_failed"
        assert call.sent[-1]["more_body"] is False

    server.run(main())


def test_a_deadline_that_passes_is_a_408(server) -> None:
    response = server.post(PATH, {**LONG, "timeout_ms": 1.0})
    assert response.status_code == 408
    assert response.json()["error"]["param"] == "timeout_ms"


def test_a_defect_of_ours_is_an_error_object_too(server, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(server.llm, "submit", fail)
    response = server.post(PATH, LONG)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"


def test_a_model_that_was_closed_is_a_503(make_server) -> None:
    server = make_server()
    server.run(server.llm.close())
    response = server.post(PATH, LONG)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "shutting_down"
