"""Clients of every kind at once on real sockets: each gets an answer or an error object; nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastserve.engine.async_llm import AsyncLLM
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.app import create_app
from fastserve.serve.key_file import digest_of
from fastserve.serve.options import ServeOptions
from fastserve.serve.run import bind, make_server
from serve.conftest import OPTIONS, STORIES

pytest.importorskip("fastserve._native")

POLICIES = ("boost", "fcfs", "mlfq", "priority", "sjf", "hrrn")
SERVE = ServeOptions(port=0, max_body=20_000, keep_alive_seconds=0.05, write_seconds=5)
MAY_COME = {
    "whole": {200, 429},
    "streamed": {200, 429},
    "slow": {200, 429},
    "late": {200, 408, 429},
    "out of range": {400},
    "too long": {400},
    "malformed": {400},
    "no HTTP": {400},
    "oversized": {413},
    "wrong key": {401},
    "unknown model": {404},
    "hangs up": {None, 200, 429},
    "half a body": {None},
}


class Clients:
    """Makes calls of a kind and checks what comes of them."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._random = random.Random(seed)
        self.statuses: Counter[tuple[str, int | None]] = Counter()

    async def call(self) -> None:
        kind = self._random.choice(list(MAY_COME))
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            status = await asyncio.wait_for(self._talk(kind, reader, writer), 60)
        finally:
            writer.transport.abort()
        assert status in MAY_COME[kind], (kind, status)
        self.statuses[kind, status] += 1

    async def _talk(
        self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> int | None:
        request = self._request(kind)
        if kind == "half a body":
            writer.write(request[:-10])
            await asyncio.sleep(self._random.random() / 50)
            return None
        writer.write(request)
        if kind == "hangs up":
            await asyncio.sleep(self._random.random() / 20)
            return None
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        body = b""
        if kind == "slow" and status == 200:
            for _ in range(self._random.randrange(6)):
                body += await reader.read(200)
                await asyncio.sleep(0.02)
        body += await reader.read()
        if status != 200:
            assert set(json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])["error"]) == {
                "message",
                "type",
                "param",
                "code",
            }
        elif b"text/event-stream" in head:
            assert b"data: [DONE]" in body or b'"error"' in body
        else:
            assert json.loads(body)["choices"][0]["finish_reason"] in ("stop", "length")
        return status

    def _request(self, kind: str) -> bytes:
        random = self._random
        body: dict[str, Any] = {
            "model": STORIES,
            "prompt": [random.randrange(3, 500) for _ in range(random.choice((1, 8, 60)))],
            "max_tokens": random.choice((1, 5, 40)),
            "ignore_eos": True,
            "stream": kind in ("streamed", "slow") or (kind == "hangs up" and random.random() < 0.7),
            "n": random.choice((1, 1, 2)),
            "user": random.choice(("a", "b")),
            "priority": random.randrange(3),
        }
        if kind == "no HTTP":
            return b"\x16\x03\x01 no HTTP\r\n\r\n"
        if kind == "late":
            body["timeout_ms"] = random.choice((0.5, 20.0, 500.0))
        body |= {
            "out of range": {"top_p": 2},
            "too long": {"max_tokens": 1000},
            "oversized": {"stop": ["x" * 30_000]},
            "unknown model": {"model": "gpt"},
        }.get(kind, {})
        content = b"{" if kind == "malformed" else json.dumps(body).encode()
        key = "wrong" if kind == "wrong key" else "right"
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content


@asynccontextmanager
async def serving(llm: AsyncLLM) -> AsyncIterator[int]:
    """Serve in this process and loop; the port."""
    app = create_app([llm], SERVE, keys=ApiKeys({"tenant": digest_of("right")}))
    listener = bind(SERVE)
    server = make_server(app, SERVE, tls=None, announce=lambda _: None)
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    await asyncio.wait_for(task, 30)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def soak(model: Path, num_calls: int, num_at_once: int = 24) -> None:
    options = replace(OPTIONS, max_waiting=16, max_sequences=8, kv_spill="256KiB", kv_memory="256KiB")
    llm = AsyncLLM(model, options, name=STORIES)
    async with serving(llm) as port:
        clients, gate = Clients(port, seed=num_calls), asyncio.Semaphore(num_at_once)

        async def call(index: int) -> None:
            async with gate:
                if index % 50 == 0:
                    await llm.set_policy(POLICIES[index // 50 % len(POLICIES)])
                await clients.call()

        async def run(first: int, last: int) -> tuple[int, int, int]:
            """Make calls; then, when all is quiet: open descriptors, tasks, bytes of memory."""
            await asyncio.gather(*(call(index) for index in range(first, last)))
            async with asyncio.timeout(30):
                while (await llm.status()).num_free_blocks < llm.model.executable.limits.num_blocks:
                    await asyncio.sleep(0.02)
                status = await llm.status()
                assert (status.num_waiting, status.num_resident, status.num_slow) == (0, 0, 0)
                assert status.num_slow_blocks_used == 0
                while llm._streams or llm._answers:
                    await asyncio.sleep(0.02)
                await asyncio.sleep(0.3)
            return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks()), resident_bytes()

        before = await run(0, num_calls // 3)
        after = await run(num_calls // 3, num_calls)
        assert after[:2] == before[:2]
        assert after[2] - before[2] < 8_000_000
        kinds = {kind for kind, _ in clients.statuses}
        assert kinds == MAY_COME.keys()
        assert sum(clients.statuses.values()) == num_calls


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors where Linux shows them")
@pytest.mark.parametrize("num_calls", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_request_is_answered_and_nothing_is_left(stories_for_chat: Path, num_calls: int) -> None:
    asyncio.run(soak(stories_for_chat, num_calls))
