"""The script of a measured process: `python worker.py MODULE` reads commands, answers each, as lines of JSON.

{"command": "prepare", "job": {...}, "folder": PATH}          → {"job": changes to the job}
{"command": "open", "job": {...}}                             → {"version": ..., "weights": ...}
{"command": "generate", "prompts": [[id]], "max_tokens": n}   → {"seconds": s, "token_ids": [[id]]}
{"command": "embed", "texts": [[id]]}                         → {"seconds": s, "embeddings": [[x]]}
{"command": "cost", "prompts": ..., "max_tokens": n}          → {"calls": ...}, of our own engine alone
{"command": "memory"}                                         → {"peak_memory_bytes": n}
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    # Engines print what they like: answers alone go to the standard output we were given.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(sys.argv[1])
    engine = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "open":
            engine = module.Engine(request["job"])
            answer = {"version": engine.version, "weights": engine.weights}
        elif request["command"] == "prepare":
            answer = {"job": module.prepare(request["job"], request["folder"])}
        else:
            answer = run(engine, request)
        print(json.dumps(answer), file=answers, flush=True)


def run(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    if request["command"] == "memory":
        return {"peak_memory_bytes": peak_memory_bytes(os.getpid())}
    if request["command"] == "cost":
        return {"calls": engine.cost(request["prompts"], request["max_tokens"])}
    start = time.perf_counter()
    if request["command"] == "embed":
        embeddings = engine.embed(request["texts"])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "embeddings": [list(map(float, row)) for row in embeddings]}
    token_ids = engine.generate(request["prompts"], request["max_tokens"])
    return {"seconds": time.perf_counter() - start, "token_ids": token_ids}


def peak_memory_bytes(pid: int) -> int:
    """VmHWM of a process and of all that it started (Linux: proc_pid_status(5))."""
    own = next(
        int(line.split()[1]) * 1024
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return own + sum(map(peak_memory_bytes, children))


if __name__ == "__main__":
    main()
