"""What HTTP, tokenizing and scheduling take of a step: a server whose streams are asked anew as they end, by
its own metrics and the processor time of its threads. Linux only."""

from __future__ import annotations

import argparse
import json
import re
import select
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from report import DEFAULT_MODEL, make_parser, publish

_WARM_SECONDS = 3.0
_PROMPT = "The history of the town begins with a bridge over the river. "


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--policy", default="boost")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "fastserve.cli.main", "serve", arguments.model, "--offline", "--json"]
    command += ["--port", "0", "--threads", str(arguments.threads), "--policy", arguments.policy]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            url = read_url(server)
            results = measure(url, server.pid, arguments)
        finally:
            server.terminate()
    rows: list[tuple[str, object]] = [
        ("turns a second, nearly all of them tokens", f"{results['turns_per_second']:.0f}"),
        ("milliseconds of a step", f"{results['step_ms']:.2f}"),
        ("  of it: schedule", f"{results['schedule_ms']:.2f}"),
        ("  run, with the batch's making", f"{results['run_ms']:.2f}"),
        ("  emit", f"{results['emit_ms']:.2f}"),
        ("  between steps", f"{results['between_ms']:.2f}"),
        ("processor milliseconds of the event loop", f"{results['loop_ms']:.2f}"),
        ("of the threads that tokenize", f"{results['tokenizing_ms']:.2f}"),
        ("of the clients", f"{results['client_ms']:.2f}"),
        ("HTTP, tokenizing and scheduling, share of a step", f"{results['overhead_share']:.1%}"),
    ]
    publish(arguments, results, rows)


def read_url(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    text = ""
    while not text.rstrip().endswith("}"):
        line = server.stdout.readline()
        if not line:
            sys.exit("the server has not started")
        text += line
    return str(json.loads(text)["url"])


def measure(url: str, pid: int, arguments: argparse.Namespace) -> Mapping[str, float]:
    """Means over the steps of the time that is measured."""
    num_streams = arguments.streams
    own = {task.name for task in Path(f"/proc/{pid}/task").iterdir()}  # those that tokenize come later
    with Streams(url, arguments.model, num_streams, arguments.max_tokens) as streams:
        streams.drain(_WARM_SECONDS)
        before, threads_before, started = read_metrics(url), thread_seconds(pid, own), time.perf_counter()
        client_before = time.process_time()
        num_bytes = streams.drain(arguments.seconds)
        client_seconds = time.process_time() - client_before
        wall = time.perf_counter() - started
        after, threads_after = read_metrics(url), thread_seconds(pid, own)
    num_steps = after["step_sequences_count"] - before["step_sequences_count"]
    sequences = (after["step_sequences_sum"] - before["step_sequences_sum"]) / num_steps
    if sequences < 0.9 * num_streams:
        sys.exit(f"only {sequences:.1f} of {num_streams} streams ran at once: choose fewer")
    phase_ms = {
        phase: 1000 * (after[f"step_seconds_sum {phase}"] - before[f"step_seconds_sum {phase}"]) / num_steps
        for phase in ("schedule", "run", "emit")
    }
    spent = {name: threads_after.get(name, 0.0) - threads_before.get(name, 0.0) for name in threads_after}
    step_ms = 1000 * wall / num_steps
    between_ms = step_ms - sum(phase_ms.values())
    loop_ms = 1000 * spent["loop"] / num_steps
    tokenizing_ms = 1000 * spent["tokenizing"] / num_steps
    overhead_ms = loop_ms + tokenizing_ms + phase_ms["schedule"] + phase_ms["emit"] + between_ms
    return {
        "turns_per_second": sequences * num_steps / wall,
        "step_sequences": sequences,
        "step_ms": step_ms,
        **{f"{phase}_ms": value for phase, value in phase_ms.items()},
        "between_ms": between_ms,
        "loop_ms": loop_ms,
        "tokenizing_ms": tokenizing_ms,
        "client_ms": 1000 * client_seconds / num_steps,
        "bytes_per_token": num_bytes / (sequences * num_steps),
        "overhead_share": overhead_ms / step_ms,
    }


class Streams:
    """Connections with a streamed chat each, read by one thread that looks at nothing but the end."""

    def __init__(self, url: str, model: str, num_streams: int, max_tokens: int) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._requests: dict[int, bytes] = {}  # by descriptor
        self._connections: dict[int, socket.socket] = {}
        self._poll = select.poll()
        for seed in range(num_streams):
            connection = socket.create_connection((host, int(port)))
            number = connection.fileno()
            self._connections[number] = connection
            # Streams end one after the other, not all at once.
            self._requests[number] = make_request(host, model, seed, max_tokens + seed * 2)
            self._poll.register(number, select.POLLIN)
            connection.sendall(self._requests[number])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.close()

    def drain(self, seconds: float) -> int:
        """Read what comes for so long, and ask again where a stream ends; the number of bytes."""
        end, num_bytes = time.perf_counter() + seconds, 0
        while (left := end - time.perf_counter()) > 0:
            for number, _ in self._poll.poll(1000 * left):
                data = self._connections[number].recv(65536)
                if not data:
                    sys.exit("a stream has ended early")
                num_bytes += len(data)
                if data.endswith(b"0\r\n\r\n"):
                    self._connections[number].sendall(self._requests[number])
        return num_bytes


def make_request(host: str, model: str, seed: int, max_tokens: int) -> bytes:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": _PROMPT * 4 + f"Number {seed}."}],
        "seed": seed,
        "ignore_eos": True,
        "max_tokens": max_tokens,
        "stream": True,
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def read_metrics(url: str) -> dict[str, float]:
    """Values by name without prefix, and by the label beside the model, where there is one."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    values = {}
    for name, labels, value in re.findall(r"^fastserve_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        others = [text for key, text in re.findall(r'(\w+)="([^"]*)"', labels) if key != "model"]
        values[" ".join([name, *others])] = float(value)
    return values


def thread_seconds(pid: int, own: set[str]) -> dict[str, float]:
    """Processor time of the event loop, which is the first thread, of those that tokenize, and others."""
    seconds = {"loop": 0.0, "tokenizing": 0.0, "other": 0.0}
    for task in Path(f"/proc/{pid}/task").iterdir():
        kind = "loop" if int(task.name) == pid else "other" if task.name in own else "tokenizing"
        seconds[kind] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return seconds


if __name__ == "__main__":
    main()
