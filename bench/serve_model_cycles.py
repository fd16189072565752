"""Whether a server that loads and unloads models leaves memory behind, and answers all who ask for two models
where memory holds one. Linux only.

Each cycle loads a model, has it answer, and unloads it; what the server holds between cycles is read from the
system. Cycles before those that count bring libraries, pools and the heaps of threads, which stay: growth is
that from the last ten of them to the last ten of all. Ends with an error code where memory grows by more than
2 %, a descriptor or thread is left, or a request fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from report import DEFAULT_MODEL, make_parser, publish

MOST_GROWTH = 0.02
ADMIN_KEY = "fs-of-the-cycles"
_SETTLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Held:
    """What a process has."""

    resident_bytes: int
    own_bytes: int  # of that, not of files
    descriptors: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> Held:
        process = Path(f"/proc/{pid}")
        lines = (line.split() for line in (process / "status").read_text().splitlines())
        status = {words[0]: words[1] for words in lines if len(words) > 1}
        return cls(
            resident_bytes=1024 * int(status["VmRSS:"]),
            own_bytes=1024 * int(status["RssAnon:"]),
            descriptors=len(list((process / "fd").iterdir())),
            threads=int(status["Threads:"]),
        )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs=2, default=[DEFAULT_MODEL, "all-minilm-l6-v2"])
    parser.add_argument("--model-memory", default="400MiB", help="that holds one of them")
    parser.add_argument("--kv-memory", default="128MiB")
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--warm-cycles", type=int, default=40, help="before those")
    parser.add_argument("--requests", type=int, default=60, help="to both models at once")
    parser.add_argument("--at-once", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        admin = Path(folder) / "admin"
        admin.write_text(f"admin {hashlib.sha256(ADMIN_KEY.encode()).hexdigest()}\n")
        command = [sys.executable, "-m", "fastserve.cli.main", "serve", *arguments.models, "--offline"]
        command += ["--json", "--port", "0", "--admin-key-file", str(admin)]
        command += ["--model-memory", arguments.model_memory, "--kv-memory", arguments.kv_memory]
        command += ["--model-turn-seconds", "2"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            try:
                url = read_url(process)
                results = {**cycle(url, process.pid, arguments), **ask_both(url, arguments)}
            finally:
                process.terminate()
    rows: list[tuple[str, object]] = [
        ("cycles of load, answer and unload", results["cycles"]),
        ("MB held while loaded, median", f"{results['loaded_bytes'] / 1e6:.1f}"),
        ("MB held between cycles, when warm", f"{results['first_bytes'] / 1e6:.1f}"),
        ("  at last", f"{results['last_bytes'] / 1e6:.1f}"),
        ("  growth", f"{results['growth']:+.2%}"),
        ("MB not of files, when warm and at last", f"{results['first_own']} and {results['last_own']}"),
        ("descriptors and threads more at the end", f"{results['descriptors']}, {results['threads']}"),
        ("seconds of a load, median", f"{results['load_seconds']:.2f}"),
        ("requests to both, answered", f"{results['answered']} of {arguments.requests}"),
        ("loads that they took", results["loads"]),
        ("most models loaded at once", results["most_loaded"]),
        ("seconds of all, and of the slowest", f"{results['seconds']:.1f}, {results['slowest']:.1f}"),
    ]
    publish(arguments, results, rows)
    failures = find_failures(results, arguments)
    if failures:
        sys.exit("; ".join(failures))


def find_failures(results: Mapping[str, Any], arguments: argparse.Namespace) -> list[str]:
    """What is not as it must be."""
    checks = (
        (results["growth"] > MOST_GROWTH, f"memory has grown by {results['growth']:.1%}"),
        (results["descriptors"] > 0, f"{results['descriptors']} descriptors are left"),
        (results["threads"] > 0, f"{results['threads']} threads are left"),
        (results["answered"] < arguments.requests, f"only {results['answered']} requests were answered"),
        (results["most_loaded"] > 1, "more models were loaded than fit"),
        (results["loads"] < 2, "no model was given up for the other"),
    )
    return [text for is_so, text in checks if is_so]


def cycle(url: str, pid: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load and unload each model in turn."""
    between: list[Held] = []
    loaded: list[int] = []
    load_seconds: list[float] = []
    for index in range(arguments.warm_cycles + arguments.cycles):
        name = arguments.models[index % 2]
        started = time.perf_counter()
        post(url, "/admin/models/load", {"model": name})
        load_seconds.append(time.perf_counter() - started)
        ask(url, name, index)
        loaded.append(Held.by(pid).resident_bytes)
        post(url, "/admin/models/unload", {"model": name})
        between.append(Held.by(pid))
    time.sleep(_SETTLE_SECONDS)
    between.append(Held.by(pid))
    warm = between[: arguments.warm_cycles]
    first, last = _settled(warm[-10:]), _settled(between[-10:])
    return {
        "cycles": arguments.cycles,
        "loaded_bytes": median(loaded),
        "first_bytes": first.resident_bytes,
        "last_bytes": last.resident_bytes,
        "growth": last.resident_bytes / first.resident_bytes - 1,
        "first_own": f"{first.own_bytes / 1e6:.1f}",
        "last_own": f"{last.own_bytes / 1e6:.1f}",
        "descriptors": between[-1].descriptors - max(held.descriptors for held in warm),
        "threads": between[-1].threads - max(held.threads for held in warm),
        "load_seconds": median(load_seconds),
        "held_bytes": [held.resident_bytes for held in between],
    }


def _settled(held: Sequence[Held]) -> Held:
    """The median by memory: of one look alone, what was just freed may be missing."""
    return sorted(held, key=lambda h: h.resident_bytes)[len(held) // 2]


def ask_both(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Requests to both models at once, of which memory holds one."""
    before = loads(url)
    most_loaded = 0

    def answer(index: int) -> float:
        nonlocal most_loaded
        started = time.perf_counter()
        ask(url, arguments.models[index % 2], index)
        states = [model["state"] for model in get(url, "/admin/models")["models"]]
        most_loaded = max(most_loaded, sum(state != "unloaded" for state in states))
        return time.perf_counter() - started

    started = time.perf_counter()
    with ThreadPoolExecutor(arguments.at_once) as pool:
        futures = [pool.submit(answer, index) for index in range(arguments.requests)]
    seconds = [future.result() for future in futures if future.exception() is None]
    for future in futures:
        if (error := future.exception()) is not None:
            print(f"a request has failed: {error}", file=sys.stderr)
    return {
        "answered": len(seconds),
        "loads": loads(url) - before,
        "most_loaded": most_loaded,
        "seconds": time.perf_counter() - started,
        "slowest": max(seconds, default=0.0),
    }


def loads(url: str) -> int:
    return sum(int(model["num_loads"]) for model in get(url, "/admin/models")["models"])


def ask(url: str, model: str, index: int) -> None:
    """One request, of the kind that the model is made for."""
    if get(url, f"/v1/models/{model}")["task"] == "embed":
        post(url, "/v1/embeddings", {"model": model, "input": [f"text {index}"] * 8})
    else:
        prompt = f"Number {index} of the stories about the river begins so:"
        body = {"model": model, "prompt": prompt, "max_tokens": 16, "ignore_eos": True}
        answer = post(url, "/v1/completions", body)
        if answer["usage"]["completion_tokens"] != 16:
            raise ValueError(f"{model} has not answered whole: {answer}")


def get(url: str, path: str) -> Any:
    return _send(urllib.request.Request(f"{url}{path}"))


def post(url: str, path: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(f"{url}{path}", data=json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return _send(request)


def _send(request: urllib.request.Request) -> Any:
    request.add_header("Authorization", f"Bearer {ADMIN_KEY}")
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{error.code}: {error.read().decode()[:300]}") from error


def read_url(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    text = ""
    for line in server.stdout:
        text += line
        if line == "}\n":
            break
    if '"url"' not in text:
        sys.exit(f"the server has not started: {text}")
    return str(json.loads(text)["url"])


if __name__ == "__main__":
    main()
