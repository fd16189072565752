"""Real sockets: a client that does not send what is to come keeps no connection, and a server ends soon."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from fastserve.backends.native import weights
from fastserve.engine.async_llm import AsyncLLM
from fastserve.serve import run
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.app import create_app
from fastserve.serve.model_loading import find_models
from fastserve.serve.options import ServeOptions
from serve.conftest import OPTIONS, STORIES

pytest.importorskip("fastserve._native")

HALF_SECONDS, IDLE_SECONDS = 0.4, 1.2  # heads and bodies, connections without a request
LATE_SECONDS = 5.0  # of a busy machine
ASK = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
STRANGER = b"POST /v1/completions HTTP/1.1\r\nHost: elsewhere\r\nContent-Length: 100\r\n\r\n"


class Site:
    """A server with little patience, on an event loop of its own."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.loop = asyncio.new_event_loop()
        options = ServeOptions(port=0, body_seconds=HALF_SECONDS)
        self.app = create_app([llm], options, keys=ApiKeys({}))
        listener = run.bind(options)
        self.port = listener.getsockname()[1]
        self._server = run.make_server(self.app, options, tls=None, announce=lambda _: None)
        self._task = self.loop.create_task(self._server.serve([listener]))
        self.loop.run_until_complete(asyncio.wait_for(self._wait_for_start(), 60))

    async def _wait_for_start(self) -> None:
        while not self._server.started:
            await asyncio.sleep(0.01)

    def talk(self, *pieces: bytes, pause: float = 0.0) -> tuple[bytes, float]:
        """What the server says before it closes the connection, and how long after the last answer it does;
        the last piece is sent byte by byte, with a pause after each."""
        return self.loop.run_until_complete(asyncio.wait_for(self._talk(*pieces, pause=pause), 60))

    async def _talk(self, *pieces: bytes, pause: float) -> tuple[bytes, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        said = b""
        for piece in pieces[:-1]:
            writer.write(piece)
            said += await reader.read(10_000)
        started = time.monotonic()
        ending = asyncio.create_task(reader.read())
        try:
            for byte in pieces[-1]:
                if ending.done():
                    break
                writer.write(bytes([byte]))
                await asyncio.sleep(pause)
            said += await ending
        except ConnectionError:
            pass
        seconds = time.monotonic() - started
        writer.transport.abort()
        return said, seconds

    def close(self) -> None:
        self._server.should_exit = True
        self.loop.run_until_complete(asyncio.wait_for(self._task, 30))
        self.loop.close()


@pytest.fixture(scope="module")
def site(stories_for_chat) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_IDLE_SECONDS", IDLE_SECONDS)
        site = Site(AsyncLLM(stories_for_chat, OPTIONS, name=STORIES))
        yield site
        site.close()


@pytest.mark.parametrize("before", [(), (ASK,), (ASK, ASK)], ids=["first", "second", "third"])
@pytest.mark.parametrize("pause", [0.0, 0.1], ids=["half", "trickled"])
def test_the_head_of_a_request_is_waited_for_no_longer_than_may_be(site, before, pause: float) -> None:
    said, seconds = site.talk(*before, ASK[:-1], pause=pause)
    assert said.count(b"200 OK") == len(before)
    assert HALF_SECONDS <= seconds < HALF_SECONDS + LATE_SECONDS
    assert pause == 0 or seconds < pause * len(ASK)


@pytest.mark.parametrize("before", [(), (ASK,)], ids=["new", "used"])
def test_a_connection_without_a_request_is_closed(site, before) -> None:
    _, seconds = site.talk(*before, b"")
    assert IDLE_SECONDS - 0.1 <= seconds < IDLE_SECONDS + LATE_SECONDS


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (STRANGER, b"403 Forbidden"),
        (b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n", b"200 OK"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n", b"408 "),
    ],
    ids=["refused", "not read", "late"],
)
@pytest.mark.parametrize("pause", [0.0, 0.1], ids=["half", "trickled"])
def test_a_body_is_waited_for_no_longer_than_may_be(site, head: bytes, status: bytes, pause: float) -> None:
    said, seconds = site.talk(head, b"x" * 99, pause=pause)
    assert status in said
    assert seconds < HALF_SECONDS + LATE_SECONDS
    assert pause == 0 or seconds < pause * 99


def test_a_server_that_is_told_to_end_gives_up_the_load_of_a_model(stories_for_chat, monkeypatch) -> None:
    """And refuses at once who waits for it, while the model packs one matrix after the other, slowly."""
    pack, num_packed = weights.pack, 0

    def pack_slowly(*arguments: Any) -> Any:
        nonlocal num_packed
        num_packed += 1
        time.sleep(0.25)
        return pack(*arguments)

    monkeypatch.setattr(weights, "pack", pack_slowly)
    options = ServeOptions(port=0, model_memory="1GiB")

    async def main() -> tuple[bytes, float]:
        models = find_models([str(stories_for_chat)], options, OPTIONS)
        app = create_app(models, options, keys=ApiKeys({}))
        listener = run.bind(options)
        server = run.make_server(app, options, tls=None, announce=lambda _: None)
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.getsockname()[1])
        body = json.dumps({"model": STORIES, "prompt": "He", "max_tokens": 2}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        while num_packed < 2:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        server.should_exit = True
        said = await reader.read()
        await serving
        seconds = time.monotonic() - started
        writer.close()
        return said, seconds

    said, seconds = asyncio.run(asyncio.wait_for(main(), 60))
    assert b"503 Service Unavailable" in said
    assert b'"code": "shutting_down"' in said
    assert num_packed < 10
    assert seconds < LATE_SECONDS


def test_who_sends_whole_requests_keeps_the_connection_however_long_answers_take(site, monkeypatch) -> None:
    async def refresh() -> None:
        await asyncio.sleep(2 * IDLE_SECONDS)

    monkeypatch.setattr(site.app.state.service.engine_metrics, "refresh", refresh)
    slow = ASK.replace(b"/health/live", b"/metrics")
    said, _ = site.talk(slow, ASK, ASK, b"")
    assert said.count(b"HTTP/1.1 200 OK") == 3


def test_a_body_that_comes_late_but_whole_leaves_the_connection_usable(site) -> None:
    said, seconds = site.talk(STRANGER, b"x" * 100 + ASK)
    assert said.count(b"403 Forbidden") == said.count(b"200 OK") == 1
    assert seconds >= IDLE_SECONDS - 0.1


def test_while_it_serves_threads_hand_the_interpreter_over_sooner(monkeypatch) -> None:
    before, during = sys.getswitchinterval(), []

    class Server:
        def run(self, sockets: object) -> None:
            during.append(sys.getswitchinterval())

    monkeypatch.setattr(run, "make_server", lambda *_, **__: Server())
    with socket.socket() as listener:
        run.serve(FastAPI(), ServeOptions(), listener=listener, tls=None, announce=lambda _: None)
    assert during == [pytest.approx(run.SWITCH_SECONDS)]
    assert sys.getswitchinterval() == before
