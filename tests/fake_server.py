"""A server with the API of OpenAI that writes words at a steady pace, or misbehaves as told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TOKENS_PER_WORD = 2  # of prompts
TEMPLATE_TOKENS = 7  # of a chat


@dataclass
class Behaviour:
    """How the server answers.

    Attributes:
        token_seconds: between two tokens.
        slots: requests that are answered at once; others wait.
        ending: of a stream: `whole`, or after half of it `close` (the connection), `stall`, `error` (an error
            object), `garbage` (no JSON), `nested` (JSON too deep to parse), `silent end` (without a
            finish reason).
        refuses: fields that it refuses with 400.
        status: of every answer to a completion after the first `num_good`, if not 200.
        num_good: requests that are answered well before `ending` and `status` take effect.
        num_kept: requests of a connection after which it is closed as the next one comes.
    """

    token_seconds: float = 0.002
    slots: int = 1000
    ending: str = "whole"
    refuses: tuple[str, ...] = ()
    tells_usage: bool = True
    status: int = 200
    num_good: int = 0
    num_kept: int = 1_000_000


@dataclass
class FakeServer:
    behaviour: Behaviour
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    num_at_once: int = 0
    num_disconnects: int = 0
    token_times: dict[str, list[float]] = field(default_factory=dict)  # when written, by the prompt
    free_slots: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.free_slots = asyncio.Semaphore(self.behaviour.slots)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                for _ in range(self.behaviour.num_kept):
                    if not await self._answer(reader, writer):
                        return
                await reader.readexactly(1)
                writer.transport.abort()
        finally:
            writer.transport.abort() if self.behaviour.ending == "close" else writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection lives on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")[1:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))))
        self.bodies.append(body)
        self.headers.append(headers)
        refused = [name for name in self.behaviour.refuses if name in body]
        if refused:
            message = f"unknown field {refused[0]}"
            await _write(writer, 400, {"error": {"message": message, "type": "invalid_request_error"}})
            return True
        is_good = len(self.bodies) <= self.behaviour.num_good
        if not is_good and self.behaviour.status != 200:
            error = {"message": "try later", "type": "rate_limit_error", "code": "queue_full"}
            await _write(writer, self.behaviour.status, {"error": error})
            return True
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        try:
            async with self.free_slots:
                return await self._stream(writer, body, "whole" if is_good else self.behaviour.ending)
        except ConnectionError:
            self.num_disconnects += 1
            raise
        finally:
            self.num_at_once -= 1

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], ending: str) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        num_tokens = body["max_tokens"]
        for index in range(num_tokens):
            if index == num_tokens // 2 and ending != "whole":
                return await self._misbehave(writer, ending)
            await asyncio.sleep(self.behaviour.token_seconds)
            text = " word"
            choice: dict[str, Any] = {"index": 0, "finish_reason": None}
            choice |= {"delta": {"content": text}} if "messages" in body else {"text": text}
            if index == num_tokens - 1:
                choice["finish_reason"] = "length"
            self.token_times.setdefault(prompt_of(body), []).append(time.perf_counter())
            await _send(writer, {"choices": [choice]})
        if self.behaviour.tells_usage and "stream_options" in body:
            usage = {"prompt_tokens": count_tokens(body), "completion_tokens": num_tokens}
            await _send(writer, {"choices": [], "usage": usage})
        await _chunk(writer, b": a comment\n\ndata: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _misbehave(self, writer: asyncio.StreamWriter, ending: str) -> bool:
        if ending == "stall":
            await asyncio.sleep(60)
        elif ending == "error":
            await _send(writer, {"error": {"message": "the step failed", "code": "engine_error"}})
        elif ending == "garbage":
            await _chunk(writer, b"data: {not json\n\n")
        elif ending == "nested":
            await _chunk(writer, b"data: " + b"[" * 200_000 + b"\n\n")
        if ending in ("close", "stall"):
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def count_tokens(body: dict[str, Any]) -> int:
    """As the server counts those of a prompt."""
    overhead = TEMPLATE_TOKENS if "messages" in body else 0
    return overhead + TOKENS_PER_WORD * len(prompt_of(body).split())


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"] if "messages" in body else body["prompt"])


async def _write(writer: asyncio.StreamWriter, status: int, document: dict[str, Any]) -> None:
    data = json.dumps(document).encode()
    head = f"HTTP/1.1 {status} No\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()


async def _send(writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
    await _chunk(writer, f"data: {json.dumps(document)}\n\n".encode())


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


@contextmanager
def run_fake_server(behaviour: Behaviour | None = None) -> Iterator[FakeServer]:
    """The server in a thread of its own, on a free port."""
    fake = FakeServer(behaviour or Behaviour())
    has_started = threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        has_ended = asyncio.Event()
        loops.append((asyncio.get_running_loop(), has_ended))
        server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        has_started.set()
        await has_ended.wait()
        server.close()
        await asyncio.sleep(0.05)  # connections that are just being made become tasks
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)  # their connections are closed

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    has_started.wait()
    try:
        yield fake
    finally:
        loop, has_ended = loops[0]
        loop.call_soon_threadsafe(has_ended.set)
        thread.join()
