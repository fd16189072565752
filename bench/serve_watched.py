"""What it costs that somebody watches a server: its throughput with and without an open `/admin/events`, in
turn, on one server whose streams are asked anew as they end; with --browser an open dashboard, in a browser
on the same cores. Linux only."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from report import DEFAULT_MODEL, make_parser, publish
from serve_overhead import Streams, read_metrics, read_url

_WARM_SECONDS = 3.0
_SETTLE_SECONDS = 0.5  # after somebody has begun to watch, or has left
_KEY = "fs-admin-key-of-this-benchmark"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each half of a pair")
    parser.add_argument("--watchers", type=int, default=1)
    parser.add_argument("--interval-seconds", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--browser", action="store_true", help="open the dashboard, in chromium")
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".admin") as key_file:
        key_file.write(f"admin {hashlib.sha256(_KEY.encode()).hexdigest()}\n")
        key_file.flush()
        command = [sys.executable, "-m", "fastserve.cli.main", "serve", arguments.model, "--offline"]
        command += ["--json", "--port", "0", "--threads", str(arguments.threads)]
        command += ["--admin-key-file", key_file.name]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            try:
                results = measure(read_url(server), server.pid, arguments)
            finally:
                server.terminate()
    publish(arguments, results, to_rows(results))


def to_rows(results: Mapping[str, object]) -> Sequence[tuple[str, object]]:
    return [
        ("tokens a second, unwatched (median)", f"{results['tokens_per_second']:.0f}"),
        ("watched / unwatched, median of pairs", f"{results['ratio']:.4f}"),
        ("  of single pairs", " ".join(f"{ratio:.3f}" for ratio in sorted(results["ratios"]))),
        ("processor milliseconds of the event loop a second, unwatched", f"{results['loop_ms']:.1f}"),
        ("  watched", f"{results['watched_loop_ms']:.1f}"),
        ("kilobytes of an event", f"{results['event_bytes'] / 1000:.1f}"),
        ("events a second, all watchers", f"{results['events_per_second']:.2f}"),
    ]


def measure(url: str, pid: int, arguments: argparse.Namespace) -> Mapping[str, object]:
    halves: dict[bool, list[float]] = {False: [], True: []}
    loop_ms: dict[bool, list[float]] = {False: [], True: []}
    num_bytes = num_events = 0
    watched_seconds = 0.0
    with ExitStack() as stack:
        page = stack.enter_context(open_browser()) if arguments.browser else None
        streams = stack.enter_context(Streams(url, arguments.model, arguments.streams, arguments.max_tokens))
        streams.drain(_WARM_SECONDS)
        for pair in range(arguments.pairs):
            for is_watched in (False, True) if pair % 2 == 0 else (True, False):
                num_watchers = arguments.watchers if is_watched else 0
                watchers: list[Watcher] = [
                    Reader(url, arguments.interval_seconds) if page is None else Dashboard(url, page)
                    for _ in range(num_watchers)
                ]
                streams.drain(_SETTLE_SECONDS)
                before, loop_before, started = read_metrics(url), loop_seconds(pid), time.perf_counter()
                streams.drain(arguments.seconds)
                wall = time.perf_counter() - started
                after = read_metrics(url)
                turns = after["step_sequences_sum"] - before["step_sequences_sum"]
                halves[is_watched].append(turns / wall)
                loop_ms[is_watched].append(1000 * (loop_seconds(pid) - loop_before) / wall)
                for watcher in watchers:
                    watcher.close()
                    num_bytes += watcher.num_bytes
                    num_events += watcher.num_events
                watched_seconds += (wall + _SETTLE_SECONDS) * bool(watchers)
    ratios = [watched / alone for alone, watched in zip(halves[False], halves[True], strict=True)]
    return {
        "tokens_per_second": statistics.median(halves[False]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "loop_ms": statistics.median(loop_ms[False]),
        "watched_loop_ms": statistics.median(loop_ms[True]),
        "event_bytes": num_bytes / max(num_events, 1),
        "events_per_second": num_events / watched_seconds,
    }


class Watcher(Protocol):
    """Looks until it is closed. What it has read it counts, if it can."""

    num_bytes: int
    num_events: int

    def close(self) -> object: ...


class Reader:
    """Reads events, and does nothing with them."""

    def __init__(self, url: str, interval_seconds: float) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._connection = socket.create_connection((host, int(port)))
        self._connection.sendall(
            f"GET /admin/events?interval_seconds={interval_seconds} HTTP/1.1\r\n"
            f"Host: {host}\r\nAuthorization: Bearer {_KEY}\r\n\r\n".encode()
        )
        self.num_bytes = self.num_events = 0
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while data := self._connection.recv(1 << 20):
            self.num_bytes += len(data)
            self.num_events += data.count(b"\n\n\r\n")  # the end of an event, and of its chunk

    def close(self) -> Self:
        self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()
        if not self.num_events:
            sys.exit("the server has sent no events")
        return self


class Dashboard:
    """The page, on the view that changes most."""

    num_bytes = num_events = 0

    def __init__(self, url: str, page: Any) -> None:
        self._page = page
        page.goto(f"{url}/#scheduler")
        page.wait_for_selector(".chip")

    def close(self) -> None:
        self._page.goto("about:blank")


@contextmanager
def open_browser() -> Iterator[Any]:
    """A page of Playwright's, whose visitor has the admin key."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1600, "height": 1000})
        context.add_init_script(f"sessionStorage.setItem('fastserve.admin-key', '{_KEY}')")
        yield context.new_page()
        browser.close()


def find_browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    return found or sys.exit("no browser is installed here: chromium (Debian: apt-get install chromium)")


def loop_seconds(pid: int) -> float:
    """Processor time of the event loop, which is the first thread."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


if __name__ == "__main__":
    main()
