"""Whether a server survives its clients: requests of all sorts, many wrong, slow or given up; and kills.

Each request is answered whole, refused with OpenAI's error object, or given up by its client; afterwards the
server holds no sequence, block, task or descriptor, and no more memory than a while before. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.evaluate.event_stream import EventParser
from fastserve.evaluate.trace import data_folder
from fastserve.serve.key_file import digest_of
from report import CHECKOUT, make_parser, publish

STORIES = "model_stories260K"  # within the folder of data: small, so that thousands of requests take seconds
KEY = "fs-of-the-abuse"
OTHER_KEYS = ("fs-other-1", "fs-other-2", "fs-other-3")  # of tenants of other weights
EXPIRED_KEY, LIMITED_KEY, ADMIN_KEY = "fs-of-the-past", "fs-of-a-few", "fs-of-the-admin"
POLICIES = ("fcfs", "mlfq", "sjf", "boost")
REQUESTS_AT_ONCE = 500  # between two lines of what has happened

_PATIENCE_SECONDS = 60.0  # after which a request is stuck
_MOST_GROWTH_BYTES = 12 * 2**20  # of memory, from a fifth of the requests to their end
# asyncio's own, which come as they are needed, and the one that loads models.
_MOST_POOL_THREADS = min(32, (os.cpu_count() or 1) + 4) + 1
_SETTLE_SECONDS = 20.0
_WARM_SHARE = 0.2


class DefectError(Exception):
    """What a server must not do."""


@dataclass
class Abuse:
    """Sends requests to one server and checks what comes back."""

    host: str
    port: int
    model: str
    rng: np.random.Generator
    outcomes: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    keys: Path | None = None  # the server's file of them
    reloading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send_one(self) -> None:
        names = list(SORTS)
        weights = np.array([SORTS[name][0] for name in names], float)
        name = names[int(self.rng.choice(len(names), p=weights / weights.sum()))]
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                outcome = await SORTS[name][1](self)
        except TimeoutError:
            self.defects.append(f"{name}: stuck for {_PATIENCE_SECONDS:g} seconds")
        except DefectError as defect:
            self.defects.append(f"{name}: {defect}")
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            self.defects.append(f"{name}: the connection ended without an answer: {error!r}")
        else:
            self.outcomes[f"{name}: {outcome}"] += 1

    def body(self, **changes: Any) -> dict[str, Any]:
        """A good request, at random."""
        rng = self.rng
        words = " ".join(["once upon a time there was a little"] * int(rng.integers(1, 6)))
        # Few texts: the tokenizer keeps the last 10,000 in memory. Token ids are new each time.
        text = f"{rng.integers(200)} {words}"
        prompt = text if rng.integers(2) else rng.integers(10, 400, size=int(rng.integers(4, 60))).tolist()
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": int(rng.integers(1, 32)),
            "temperature": float(rng.choice([0.0, 1.0])),
            "n": int(rng.choice([1, 1, 1, 3])),
            "user": f"user-{rng.integers(5)}",
            "ignore_eos": True,
        }
        return {**body, **changes}

    @contextlib.asynccontextmanager
    async def connection(self) -> Any:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    @property
    def any_key(self) -> str:
        """Of one of the tenants without limits."""
        return str(self.rng.choice([KEY, *OTHER_KEYS]))

    async def ask(
        self,
        content: bytes,
        *,
        method: str = "POST",
        path: str = "/v1/completions",
        key: str | None = KEY,
        headers: str = "",
    ) -> tuple[int, bytes]:
        """A whole request and its whole answer."""
        async with self.connection() as (reader, writer):
            writer.write(head_of(content, method=method, path=path, key=key, headers=headers) + content)
            with suppress(ConnectionError):  # a body that is refused may not be read to its end
                await writer.drain()
            return await read_answer(reader)


def head_of(
    content: bytes,
    *,
    method: str = "POST",
    path: str = "/v1/completions",
    key: str | None = KEY,
    headers: str = "",
) -> bytes:
    authorization = f"Authorization: Bearer {key}\r\n" if key is not None else ""
    length = (
        "" if "Content-Length" in headers or "chunked" in headers else f"Content-Length: {len(content)}\r\n"
    )
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"{authorization}{length}{headers}\r\n"
    ).encode()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and content of an answer."""
    status, headers = await read_head(reader)
    if headers.get("transfer-encoding") == "chunked":
        content = b""
        while size := int(await reader.readline(), 16):
            content += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return status, content
    return status, await reader.readexactly(int(headers.get("content-length", 0)))


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers


def check_error(status: int, content: bytes, expected: set[int]) -> str:
    """The code of an answer that must be one of these refusals; or it was not looked at, as so many wait for
    the model to be loaded."""
    is_loading = status == 429 and b"to be loaded" in content
    if status not in expected and not is_loading:
        raise DefectError(f"status {status} and {content[:200]!r} where {sorted(expected)} was due")
    try:
        error = json.loads(content)["error"]
        complete = {"message", "type", "param", "code"} == error.keys() and error["message"]
    except (ValueError, TypeError, LookupError):
        complete = False
    if not complete:
        raise DefectError(f"status {status} without an error object: {content[:200]!r}")
    return f"{status} {error['code']}"


def check_stream(content: bytes) -> str:
    """How a stream ended."""
    parser = EventParser()
    events = parser.feed(content)
    if parser.is_within_event or not events:
        raise DefectError(f"a stream was cut: {content[-200:]!r}")
    if events[-1] == b"[DONE]":
        reasons = [c["finish_reason"] for e in events[:-1] for c in json.loads(e)["choices"]]
        if not any(reasons):
            raise DefectError("a stream without a finish reason")
        return "whole stream"
    return f"ended by {check_error(500, events[-1], {500})[4:]}"


async def whole_stream(abuse: Abuse) -> str:
    status, content = await abuse.ask(dump(abuse.body(stream=True)), key=abuse.any_key)
    return check_stream(content) if status == 200 else check_error(status, content, {429})


async def whole_answer(abuse: Abuse) -> str:
    body = abuse.body()
    status, content = await abuse.ask(dump(body), key=abuse.any_key)
    if status != 200:
        return check_error(status, content, {429})
    if len(json.loads(content)["choices"]) != body["n"]:
        raise DefectError(f"{body['n']} completions were asked for: {content[:200]!r}")
    return "whole"


async def keep_alive(abuse: Abuse) -> str:
    """Several requests on one connection, the last ones sent before the first is answered."""
    async with abuse.connection() as (reader, writer):
        contents = [dump(abuse.body(stream=bool(i % 2), n=1)) for i in range(3)]
        for content in contents:
            writer.write(head_of(content) + content)
        for content in contents:
            status, answer = await read_answer(reader)
            if status != 200:
                check_error(status, answer, {429})
            elif json.loads(content)["stream"]:
                check_stream(answer)
    return "answered in turn"


async def cancel(abuse: Abuse) -> str:
    """Hang up within the stream."""
    async with abuse.connection() as (reader, writer):
        content = dump(abuse.body(stream=True, max_tokens=200, n=2))
        writer.write(head_of(content, key=abuse.any_key) + content)
        status, headers = await read_head(reader)
        if status == 200:
            await reader.read(int(abuse.rng.integers(1, 4000)))
            return "given up"
        return check_error(status, await reader.readexactly(int(headers["content-length"])), {429})


async def disconnect(abuse: Abuse) -> str:
    """Hang up before there is an answer, perhaps before the body is whole."""
    async with abuse.connection() as (_, writer):
        content = dump(abuse.body(stream=bool(abuse.rng.integers(2)), max_tokens=200))
        request = head_of(content) + content
        writer.write(request[: int(abuse.rng.integers(1, len(request) + 200))])
        await writer.drain()
        await asyncio.sleep(float(abuse.rng.random()) * 0.05)
    return "given up"


async def read_slowly(abuse: Abuse) -> str:
    """Take a large stream bit by bit, or nothing of it, through a narrow window."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    with narrow:
        await asyncio.get_running_loop().sock_connect(narrow, (abuse.host, abuse.port))
        takes_nothing = bool(abuse.rng.integers(2))
        content = dump(abuse.body(stream=True, max_tokens=200, n=4, logprobs=5))
        request = head_of(content, headers="Connection: close\r\n") + content
        await asyncio.get_running_loop().sock_sendall(narrow, request)
        if takes_nothing:
            await asyncio.sleep(3.0)  # the server may have cut it by now
            return "took nothing"
        received = b""
        for _ in range(40):
            piece = await asyncio.get_running_loop().sock_recv(narrow, 4096)
            received += piece
            if not piece:
                break
            await asyncio.sleep(0.05)
        head, _, answer = received.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            return check_error(int(head.split()[1]), answer, {429})
        return "read slowly"


async def oversized(abuse: Abuse) -> str:
    content = dump(abuse.body(prompt="x" * 200_000))
    if abuse.rng.integers(2):
        return check_error(*await abuse.ask(content), {413})
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in (content[:70_000], content[70_000:]))
    answer = await abuse.ask(pieces + b"0\r\n\r\n", headers="Transfer-Encoding: chunked\r\n")
    return check_error(*answer, {413})


async def malformed(abuse: Abuse) -> str:
    """No JSON, or what no field may be."""
    good = abuse.body()
    whole = dump(good)
    wrong: list[bytes] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        bytes(abuse.rng.integers(0, 256, 50, dtype=np.uint8)),
        whole[:-1],
        whole + b"}",
        b"[" * 10_000,
        b'{"model": "\\ud800"}',
        *(
            dump({**good, **change})
            for change in (
                {"max_tokens": -1},
                {"max_tokens": "many"},
                {"max_tokens": 10**30},
                {"temperature": -1},
                {"temperature": "NaN"},
                {"n": 0},
                {"n": 10_000},
                {"top_p": 2},
                {"stop": ["a"] * 100},
                {"logit_bias": {"no": 1}},
                {"logprobs": 1000},
                {"prompt": {"a": 1}},
                {"prompt": []},
                {"prompt": [10**9]},
                {"prompt": None},
                {"no_such_field": 1},
                {"stream": "maybe"},
                {"seed": "x"},
                {"priority_class": "best"},
                {"timeout_ms": -5},
            )
        ),
    ]
    content = wrong[int(abuse.rng.integers(len(wrong)))]
    try:
        return check_error(*await abuse.ask(content), {400})
    except DefectError as defect:
        raise DefectError(f"to {content[:120]!r}: {defect}") from None


async def too_long(abuse: Abuse) -> str:
    body = abuse.body(prompt=[5] * 400, max_tokens=int(abuse.rng.integers(200, 10_000)))
    return check_error(*await abuse.ask(dump(body)), {400})


async def wrong_key(abuse: Abuse) -> str:
    key = [None, "", "fs-wrong", "ä" * 10, KEY[:-1]][int(abuse.rng.integers(5))]
    return check_error(*await abuse.ask(dump(abuse.body()), key=key), {401})


async def expired_key(abuse: Abuse) -> str:
    return check_error(*await abuse.ask(dump(abuse.body()), key=EXPIRED_KEY), {401})


async def limited(abuse: Abuse) -> str:
    """Of a tenant that is over its limits most of the time."""
    body = abuse.body(stream=bool(abuse.rng.integers(2)))
    status, content = await abuse.ask(dump(body), key=LIMITED_KEY)
    if status != 200:
        return check_error(status, content, {429})
    return check_stream(content) if body["stream"] else "whole"


async def reload_keys(abuse: Abuse) -> str:
    """Change the file of keys, sometimes by mistake, and have the server read it; or wait until it does."""
    if abuse.keys is None:
        return "none"
    async with abuse.reloading:
        is_mistaken = abuse.rng.random() < 0.3
        abuse.keys.write_text(key_file(abuse.rng, is_mistaken=is_mistaken))
        if abuse.rng.integers(2):
            await asyncio.sleep(0.2)
            return "left to the server"
        answer = await abuse.ask(b"", path="/admin/tenants/reload", key=ADMIN_KEY)
        if is_mistaken:
            return check_error(*answer, {400})
        if answer[0] != 200:
            raise DefectError(f"a good file of keys is refused: {answer[1][:200]!r}")
        return "reloaded"


async def admin(abuse: Abuse) -> str:
    """What the admin may see, and others may not."""
    path = str(abuse.rng.choice(["/admin/tenants", "/admin/usage", "/admin/usage.csv"]))
    if abuse.rng.integers(2):
        return check_error(*await abuse.ask(b"", method="GET", path=path, key=abuse.any_key), {404})
    status, content = await abuse.ask(b"", method="GET", path=path, key=ADMIN_KEY)
    if status != 200 or b"abuser" not in content:
        raise DefectError(f"status {status} and {content[:200]!r} of {path}")
    return "told"


async def change_policy(abuse: Abuse) -> str:
    """Have all go on by another policy, sometimes by one that there is not."""
    policy = str(abuse.rng.choice([*POLICIES, "best", "boost:strength=-1"]))
    answer = await abuse.ask(dump({"policy": policy}), path="/admin/policy", key=ADMIN_KEY)
    if policy not in POLICIES:
        return check_error(*answer, {400})
    if answer[0] != 200:
        raise DefectError(f"the policy {policy} is refused: {answer[1][:200]!r}")
    return policy


async def reload_model(abuse: Abuse) -> str:
    """Have the model unloaded, after the requests that run; the next one has it loaded again."""
    name = abuse.model if abuse.rng.random() < 0.8 else "gpt-none"
    answer = await abuse.ask(dump({"model": name}), path="/admin/models/unload", key=ADMIN_KEY)
    if name != abuse.model:
        return check_error(*answer, {404})
    if answer[0] != 200:
        raise DefectError(f"the model is not unloaded: {answer[1][:200]!r}")
    return "unloaded"


async def wrong_place(abuse: Abuse) -> str:
    """Models, routes and methods that there are not."""
    content = dump(abuse.body())
    other = dump(abuse.body(model="gpt-none"))
    asked: list[tuple[dict[str, Any], bytes, set[int]]] = [
        ({}, other, {404}),
        ({"path": "/v1/nothing"}, content, {404}),
        ({"method": "GET"}, b"", {405}),
        ({"method": "PATCH"}, content, {405}),
        ({"path": "/v1/embeddings"}, dump({"model": abuse.model, "input": "a"}), {400}),
        ({"headers": "Origin: https://evil.example\r\n"}, content, {403}),
    ]
    options, body, expected = asked[int(abuse.rng.integers(len(asked)))]
    return check_error(*await abuse.ask(body, **options), expected)


async def hurried(abuse: Abuse) -> str:
    """A deadline that can hardly be kept."""
    milliseconds = float(abuse.rng.choice([0.5, 5, 20, 50]))
    body = abuse.body(timeout_ms=milliseconds, stream=bool(abuse.rng.integers(2)), max_tokens=200)
    status, content = await abuse.ask(dump(body))
    if status != 200:
        return check_error(status, content, {408, 429})
    return check_stream(content) if body["stream"] else "whole"


async def slow_body(abuse: Abuse) -> str:
    """Half a body, and then nothing."""
    async with abuse.connection() as (reader, writer):
        content = dump(abuse.body())
        writer.write(head_of(content) + content[: len(content) // 2])
        return check_error(*await read_answer(reader), {408})


async def no_http(abuse: Abuse) -> str:
    """What is no HTTP, which has no answer but the end of its connection or a plain 400."""
    async with abuse.connection() as (reader, writer):
        writer.write(
            [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n"][int(abuse.rng.integers(2))]
        )
        writer.write_eof()
        data = await reader.read()
        if data and not data.startswith(b"HTTP/1.1 400"):
            raise DefectError(f"no HTTP is answered by {data[:100]!r}")
    return "refused"


SORTS: dict[str, tuple[float, Callable[[Abuse], Awaitable[str]]]] = {
    "whole stream": (20, whole_stream),
    "whole answer": (12, whole_answer),
    "several on a connection": (4, keep_alive),
    "cancel": (14, cancel),
    "disconnect": (14, disconnect),
    "slow reader": (0.7, read_slowly),
    "oversized body": (4, oversized),
    "malformed body": (12, malformed),
    "too long": (4, too_long),
    "wrong key": (6, wrong_key),
    "expired key": (3, expired_key),
    "limited": (6, limited),
    "keys reloaded": (1, reload_keys),
    "admin": (2, admin),
    "policy changed": (0.5, change_policy),
    "model reloaded": (0.3, reload_model),
    "wrong place": (5, wrong_place),
    "hurried": (3, hurried),
    "slow body": (0.5, slow_body),
    "no HTTP": (1, no_http),
}
"""Sorts of requests, with how often each is sent, and the function that sends one and says how it ended."""


@dataclass
class AbusedServer:
    """The server, and what it tells on its standard streams."""

    process: subprocess.Popen[str]
    url: str
    model: str
    keys: Path

    def state(self) -> dict[str, Any]:
        pid = self.process.pid
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("state", file=self.process.stdin, flush=True)
        return {
            **json.loads(self.process.stdout.readline()),
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task")),
            "memory_bytes": resident_bytes(pid),
        }

    def settle(self) -> dict[str, Any]:
        """The state once nothing is under way, or after some patience."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            state = self.state()
            busy = state["sequences"] or state["blocks_owned"] or state["requests_under_way"]
            busy = busy or state["tasks"] > 4
            if not busy or time.monotonic() > deadline:
                return state
            time.sleep(0.2)


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def key_file(rng: np.random.Generator, *, is_mistaken: bool = False) -> str:
    """The keys that there are, with weights and limits at random."""
    lines = [f"abuser {digest_of(KEY)}"]
    lines += [
        f"other-{i} {digest_of(key)} tenant=t{i % 2} weight={1 + i % 2}" for i, key in enumerate(OTHER_KEYS)
    ]
    lines += [f"expired {digest_of(EXPIRED_KEY)} expires=2001-01-01"]
    lines += [
        f"limited {digest_of(LIMITED_KEY)} weight={rng.integers(1, 9)} max_concurrent={rng.integers(1, 4)} "
        f"requests_per_minute={rng.integers(60, 600)} tokens_per_minute={rng.integers(600, 60_000)}"
    ]
    if is_mistaken:
        lines.insert(int(rng.integers(len(lines))), str(rng.choice(["nobody", "x y", f"abuser {'0' * 64}"])))
    return "\n".join(lines) + "\n"


@contextmanager
def run_server(model: Path, folder: Path, log: Path) -> Iterator[AbusedServer]:
    keys, admin_file = folder / "keys.txt", folder / "admin.txt"
    keys.write_text(key_file(np.random.default_rng(0)))
    admin_file.write_text(f"admin {digest_of(ADMIN_KEY)}\n")
    command = [sys.executable, str(CHECKOUT / "bench" / "abused_server.py"), "--model", str(model)]
    command += ["--tenants", str(keys), "--admin-key-file", str(admin_file)]
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit(f"the server has not started: {log.read_text()[-600:]}")
        said = json.loads(line)
        yield AbusedServer(process, said["url"], said["model"], keys)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(40)
        process.kill()
        process.communicate()


def dump(body: Any) -> bytes:
    return json.dumps(body).encode()


def abuse_server(server: AbusedServer, arguments: argparse.Namespace) -> dict[str, Any]:
    """All requests; the states before, within and after."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    abuse = Abuse(host, int(port), server.model, np.random.default_rng(arguments.seed), keys=server.keys)
    states = {"start": server.settle()}
    started = time.perf_counter()
    done = 0
    num_warm = round(_WARM_SHARE * arguments.requests)
    for number in portions(arguments.requests, num_warm):
        asyncio.run(send_many(abuse, number, arguments.concurrency))
        done += number
        print(
            f"{done} requests after {time.perf_counter() - started:.0f} s, {len(abuse.defects)} defects, "
            f"{resident_bytes(server.process.pid) / 2**20:.1f} MiB",
            flush=True,
        )
        if done == num_warm:
            states["warm"] = server.settle()
    seconds = time.perf_counter() - started
    states["end"] = server.settle()
    defects = abuse.defects + leaks(states)
    return {
        "states": states,
        "outcomes": dict(sorted(abuse.outcomes.items())),
        "defects": defects,
        "requests_per_second": arguments.requests / seconds,
    }


def portions(num_requests: int, num_warm: int) -> list[int]:
    """Numbers of requests between two lines of what has happened, one of the lines after `num_warm`.

    >>> portions(1300, 300)
    [300, 500, 500]
    """
    rest = num_requests - num_warm
    sizes = [REQUESTS_AT_ONCE] * (num_warm // REQUESTS_AT_ONCE) + [num_warm % REQUESTS_AT_ONCE]
    sizes += [REQUESTS_AT_ONCE] * (rest // REQUESTS_AT_ONCE) + [rest % REQUESTS_AT_ONCE]
    return [size for size in sizes if size]


async def send_many(abuse: Abuse, number: int, concurrency: int) -> None:
    remaining = iter(range(number))
    abuse.reloading = asyncio.Lock()  # of this event loop

    async def send_in_turn() -> None:
        for _ in remaining:
            await abuse.send_one()

    await asyncio.gather(*(send_in_turn() for _ in range(concurrency)))


def leaks(states: dict[str, dict[str, Any]]) -> list[str]:
    start, warm, end = states["start"], states["warm"], states["end"]
    found = [
        f"{end[name]} {name.replace('_', ' ')} are left"
        for name in ("sequences", "blocks_owned", "slow_blocks_used", "requests_under_way")
        if end[name]
    ]
    found += [
        f"{end[name] - start[name]} more {name} than at the start"
        for name in ("tasks", "descriptors")
        if end[name] > start[name]
    ]
    if end["threads"] > start["threads"] + _MOST_POOL_THREADS:
        found.append(f"{end['threads'] - start['threads']} more threads than at the start")
    growth = end["memory_bytes"] - warm["memory_bytes"]
    if growth > _MOST_GROWTH_BYTES:
        found.append(f"{growth / 2**20:.1f} MiB more memory than a while before")
    return found


def kill_server(model: Path, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Kill it at some moment of its life, starts included; what a start after that does wrong."""
    rng = np.random.default_rng(arguments.seed)
    defects = []
    home = folder / "home"
    environment = {**os.environ, "FASTSERVE_HOME": str(home), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "fastserve.cli.main", "serve", str(model), "--port", "0", "--json"]
    command += ["--kv-memory", "1MiB", "--kv-spill", "2MiB", "--threads", "1", "--offline"]
    for kill in range(arguments.kills):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert process.stdout is not None
        if kill % 2:  # while it starts
            time.sleep(float(rng.random()) * arguments.start_seconds)
        else:
            url = json.loads(read_document(process))["url"]
            host, _, port = url.removeprefix("http://").partition(":")
            abuse = Abuse(host, int(port), model.name, rng)
            with suppress(TimeoutError):
                asyncio.run(asyncio.wait_for(send_many(abuse, 1000, 16), 0.05 + float(rng.random()) * 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            document = read_document(process)
            if not document:
                defects.append(f"kill {kill}: no start after it: {process.communicate()[1][-300:]}")
                continue
            host, _, port = json.loads(document)["url"].removeprefix("http://").partition(":")
            abuse = Abuse(host, int(port), model.name, rng)
            outcome = asyncio.run(whole_stream(abuse))
            if outcome != "whole stream":
                defects.append(f"kill {kill}: the first request after it: {outcome}")
        except (DefectError, OSError, asyncio.IncompleteReadError) as error:
            defects.append(f"kill {kill}: the first request after it: {error!r}")
        finally:
            process.terminate()
            process.communicate(timeout=40)
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix == ".tmp"]
    return defects + [f"{name} is left" for name in left]


def read_document(process: subprocess.Popen[str]) -> str:
    """The document that a server prints at its start; empty where it ends without."""
    assert process.stdout is not None
    text = ""
    while not text.rstrip().endswith("}"):
        line = process.stdout.readline()
        if not line:
            return ""
        text += line
    return text


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, help=f"folder of a small model; by default {STORIES} of FASTSERVE_TEST_DATA"
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--start-seconds", type=float, default=2.0, help="within which a start is killed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = arguments.model
    if model is None:
        data = data_folder() or CHECKOUT.parent / "shared" / "data"
        model = data / STORIES
    if not model.is_dir():
        sys.exit(f"{model} is no folder of a model: name one with --model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "server.log"
        with run_server(model, folder, log) as server:
            results = abuse_server(server, arguments)
        exit_code = server.process.returncode
        tracebacks = log.read_text(errors="replace").count("Traceback")
        results["kill_defects"] = kill_server(model, folder, arguments)
    if exit_code != 0:
        results["defects"].append(f"the server ended with exit code {exit_code}")
    if tracebacks:
        results["defects"].append(f"{tracebacks} tracebacks in the server's log")
    defects = results["defects"] + results["kill_defects"]
    warm, end = results["states"]["warm"], results["states"]["end"]
    publish(
        arguments,
        results,
        [
            ("requests", arguments.requests),
            ("requests a second", f"{results['requests_per_second']:.0f}"),
            *results["outcomes"].items(),
            (
                "sequences, blocks, slow blocks left",
                f"{end['sequences']}, {end['blocks_owned']}, {end['slow_blocks_used']}",
            ),
            ("tasks, descriptors, threads", f"{end['tasks']}, {end['descriptors']}, {end['threads']}"),
            ("growth of memory, MiB", f"{(end['memory_bytes'] - warm['memory_bytes']) / 2**20:.1f}"),
            ("kills", arguments.kills),
            ("defects", len(defects)),
        ],
    )
    for defect, count in Counter(defects).most_common(40):
        print(f"{count} x {defect}")
    sys.exit(bool(defects))


if __name__ == "__main__":
    main()
