"""A server as people run it: `fastserve serve` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ServerProcess:
    """Runs until the context ends; `url` is without /v1."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self._log = log

    @property
    def log(self) -> list[dict[str, Any]]:
        whole_lines = self._log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole_lines.splitlines()]

    def line_of(self, request_id: str) -> dict[str, Any]:
        """The log's line of a request, which is written after its response."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if lines := [line for line in self.log if line.get("request_id") == request_id]:
                (line,) = lines
                return line
            time.sleep(0.02)
        raise AssertionError(f"no line has {request_id}: {self.log}")

    def terminate(self) -> int:
        """SIGTERM; the exit code once it has ended."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def serving(
    model: Path, log: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Serve a model on a free port of loopback; what it writes to standard error goes to `log`."""
    command = [
        sys.executable,
        "-m",
        "fastserve.cli.main",
        "serve",
        str(model),
        "--port",
        "0",
        "--json",
        *options,
    ]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "FASTSERVE_OFFLINE": "1", **(environment or {})},
        )
    try:
        yield ServerProcess(process, _read_start(process, log)["url"], log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def _read_start(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """The document that it prints once it takes requests."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            return dict(json.loads(text))
    raise AssertionError(f"the server has not started: {text}{log.read_text()}")
