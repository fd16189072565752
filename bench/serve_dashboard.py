"""What it costs a server that it is watched: tokens a second while the events of the dashboard are read, and
while they are not, in turns. With --browser the page itself is open, in a browser on the same cores."""

from __future__ import annotations

import argparse
import hashlib
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastserve.evaluate.estimate import estimate_median
from report import DEFAULT_MODEL, make_parser, publish
from serve_overhead import Streams, read_metrics, read_url, thread_seconds

_WARM_SECONDS = 4.0
_SETTLE_SECONDS = 0.5  # after it is opened or closed
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=2000, help="so many that none ends meanwhile")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--policy", default="boost")
    parser.add_argument("--interval-seconds", type=float, default=0.5, help="of events: the page's own")
    parser.add_argument("--pairs", type=int, default=16, help="of windows without it and with it")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a window")
    parser.add_argument("--browser", action="store_true", help="open the scheduler's page (needs chromium)")
    arguments = parser.parse_args()
    key = secrets.token_urlsafe()
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder) / "admin"
        key_file.write_text(f"admin {hashlib.sha256(key.encode()).hexdigest()}\n")
        command = [
            sys.executable,
            "-m",
            "fastserve.cli.main",
            "serve",
            arguments.model,
            "--offline",
            "--json",
        ]
        command += ["--port", "0", "--threads", str(arguments.threads), "--policy", arguments.policy]
        command += ["--admin-key-file", str(key_file)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            try:
                results = measure(read_url(server), server.pid, key, arguments)
            finally:
                server.terminate()
    ratio = results["ratio"]
    rows: list[tuple[str, object]] = [
        ("tokens a second, nobody looks", f"{results['alone']:.1f}"),
        ("tokens a second, watched", f"{results['watched']:.1f}"),
        ("ratio, median of pairs", f"{ratio['value']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"),
        ("processor time of the event loop, alone", f"{results['loop_alone']:.2%} of a core"),
        ("processor time of the event loop, watched", f"{results['loop_watched']:.2%} of a core"),
        ("bytes of an event", f"{results['event_bytes']:.0f}"),
    ]
    publish(arguments, results, rows)


def measure(url: str, pid: int, key: str, arguments: argparse.Namespace) -> Mapping[str, Any]:
    own = {task.name for task in Path(f"/proc/{pid}/task").iterdir()}
    windows: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    watcher = Browser(url, key) if arguments.browser else Watcher(url, key, arguments.interval_seconds)
    with Streams(url, arguments.model, arguments.streams, arguments.max_tokens) as streams, watcher.ready():
        streams.drain(_WARM_SECONDS)
        for pair in range(arguments.pairs):
            for is_watched in (False, True) if pair % 2 else (True, False):  # drift meets both alike
                with watcher.looking(is_watched):
                    streams.drain(_SETTLE_SECONDS)
                    before, loop, start = (
                        read_metrics(url),
                        thread_seconds(pid, own)["loop"],
                        time.perf_counter(),
                    )
                    streams.drain(arguments.seconds)
                    after, seconds = read_metrics(url), time.perf_counter() - start
                    loop = thread_seconds(pid, own)["loop"] - loop
                turns = after["step_sequences_sum"] - before["step_sequences_sum"]
                windows[is_watched].append((turns / seconds, loop / seconds))
    ratios = [watched[0] / alone[0] for watched, alone in zip(windows[True], windows[False], strict=True)]
    estimate = estimate_median(ratios)
    mean = {
        is_watched: [sum(values) / len(values) for values in zip(*found, strict=True)]
        for is_watched, found in windows.items()
    }
    return {
        "alone": mean[False][0],
        "watched": mean[True][0],
        "loop_alone": mean[False][1],
        "loop_watched": mean[True][1],
        "ratios": ratios,
        "ratio": {"value": estimate.median, "low": estimate.low, "high": estimate.high},
        "event_bytes": watcher.event_bytes,
    }


class Watcher:
    """Reads events and throws them away, as a page on another machine would look to the server."""

    def __init__(self, url: str, key: str, interval_seconds: float) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = (host, int(port))
        path = f"/admin/events?interval_seconds={interval_seconds:g}"
        self._request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        self._num_events = self._num_bytes = 0

    @property
    def event_bytes(self) -> float:
        return self._num_bytes / max(self._num_events, 1)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield

    @contextmanager
    def looking(self, is_watched: bool) -> Iterator[None]:
        if not is_watched:
            yield
            return
        with socket.create_connection(self._address) as connection:
            connection.sendall(self._request)
            head = connection.recv(65536)
            if not head.startswith(b"HTTP/1.1 200"):
                sys.exit(f"the server shows no events: {head[:200]!r}")
            thread = threading.Thread(target=self._read, args=(connection,))
            thread.start()
            yield
            connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _read(self, connection: socket.socket) -> None:
        while data := connection.recv(1 << 20):
            self._num_bytes += len(data)
            self._num_events += data.count(b"\n\n")


class Browser:
    """The page itself, on the view that changes most; hidden pages are not updated."""

    event_bytes = float("nan")

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key

    @contextmanager
    def ready(self) -> Iterator[None]:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
            context = browser.new_context(viewport={"width": 1600, "height": 1000})
            context.add_init_script(f"sessionStorage.setItem('fastserve.admin-key', '{self._key}')")
            self._page = context.new_page()
            yield
            browser.close()

    @contextmanager
    def looking(self, is_watched: bool) -> Iterator[None]:
        if is_watched:
            self._page.goto(f"{self._url}/#scheduler")
            self._page.wait_for_selector(".chip")
        yield
        self._page.goto("about:blank")


def find_browser() -> str:
    binary = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if binary is None:
        sys.exit("no browser is installed here: chromium (Debian: apt-get install chromium)")
    return binary


if __name__ == "__main__":
    main()
