"""The dashboard over a server that is made up: its status moves as that of a busy one does, at every look.

For what a real server shows too rarely for a test: several engines, levels, a slow tier, models that fail.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from fastserve.engine.policy import describe_policies
from fastserve.serve.routes.dashboard import dashboard_router

ADMIN_KEY = "fs-admin"
TENANTS = {"search": 2.0, "chat": 1.0, "report": 1.0}
GIB = 2**30
FIRST_BOUNDS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
NEXT_BOUNDS = [0.01, 0.02, 0.05, 0.1, 0.2]


class FakeEngine:
    """Sequences that come, run, are preempted, sink a level and end."""

    def __init__(self, model: str, policy: str, num: int, seed: int) -> None:
        self.model, self.policy, self.num = model, policy, num
        self._random = random.Random(seed)
        self._next_id = 1
        self.sequences: list[dict[str, Any]] = []
        self.preemptions = {"passed_over": 0, "evicted": 0}
        self.recent: list[dict[str, Any]] = []
        self.totals = dict.fromkeys(
            (
                "prompt_tokens",
                "completion_tokens",
                "completions",
                "steps",
                "evictions",
                "swapped_blocks_in",
                "swapped_blocks_out",
            ),
            0,
        )
        self.prefix = {"hit": 0, "miss": 0}
        self.first = [0] * (len(FIRST_BOUNDS) + 1)
        self.next = [0] * (len(NEXT_BOUNDS) + 1)
        self.service = dict.fromkeys(TENANTS, 0.0)

    def step(self, seconds: float, now: float) -> None:
        while len(self.sequences) < self.num:
            self._arrive()
        has_levels = self.policy.startswith("mlfq")
        for sequence in self.sequences:
            sequence["age_seconds"] += seconds
            self._change_state(sequence, now)
            if sequence["state"] != "running":
                continue
            sequence["attained_seconds"] += seconds / 4
            self.service[sequence["tenant"]] += seconds * TENANTS[sequence["tenant"]] / 4
            if sequence["computed_tokens"] < sequence["prompt_tokens"]:
                before = sequence["computed_tokens"]
                sequence["computed_tokens"] = min(sequence["prompt_tokens"], before + 128)
                self.totals["prompt_tokens"] += sequence["computed_tokens"] - before
            else:
                num = self._random.randint(1, 8)
                sequence["completion_tokens"] += num
                sequence["computed_tokens"] += num
                self.totals["completion_tokens"] += num
                self.next[self._random.choices(range(len(self.next)), [1, 4, 8, 5, 2, 1])[0]] += num
                if has_levels and self._random.random() < 0.2:
                    sequence["level"] = min(5, sequence["level"] + 1)
            sequence["blocks"] = sequence["computed_tokens"] // 32 + 1
        ended = [s for s in self.sequences if s["completion_tokens"] >= s["max_tokens"]]
        self.totals["completions"] += len(ended)
        self.totals["steps"] += 12
        self.sequences = sorted(
            (s for s in self.sequences if s not in ended),
            key=lambda s: (s["level"], s["state"] != "running", s["id"]),
        )
        for place, sequence in enumerate(self.sequences):
            sequence["place"] = place

    def _arrive(self) -> None:
        is_long = self._random.random() < 0.3
        tenant = self._random.choice(list(TENANTS))
        prompt = self._random.randint(200, 900) if is_long else self._random.randint(20, 120)
        self.prefix["hit"] += 40
        self.prefix["miss"] += prompt
        self.first[self._random.choices(range(len(self.first)), [1, 3, 8, 9, 4, 2, 1, 0])[0]] += 1
        self.sequences.append(
            {
                "id": self._next_id,
                "request_id": f"req-{self._next_id:024x}",
                "tenant": tenant,
                "priority_class": "default",
                "state": "waiting",
                "level": 0,
                "place": 0,
                "prompt_tokens": prompt,
                "computed_tokens": 0,
                "completion_tokens": 0,
                "max_tokens": 400 if is_long else self._random.randint(24, 96),
                "age_seconds": 0.0,
                "attained_seconds": 0.0,
                "num_preemptions": 0,
                "blocks": 0,
            }
        )
        self._next_id += 1

    def _change_state(self, sequence: dict[str, Any], now: float) -> None:
        draw, state = self._random.random(), sequence["state"]
        if state == "running" and draw < 0.12:
            reason = self._random.choice(["passed_over", "passed_over", "evicted"])
            sequence["state"] = "paused" if reason == "passed_over" else "moving"
            sequence["num_preemptions"] += 1
            self.preemptions[reason] += 1
            by = self._random.choice(self.sequences)["id"]
            self.recent = [
                *self.recent[-63:],
                {
                    "time": now,
                    "sequence_id": sequence["id"],
                    "tenant": sequence["tenant"],
                    "reason": reason,
                    "by": by if by != sequence["id"] else None,
                },
            ]
        elif state == "moving":
            sequence["state"] = "slow"
            self.totals["swapped_blocks_out"] += sequence["blocks"]
            self.totals["evictions"] += 1
        elif state == "slow" and draw < 0.3:
            sequence["state"] = "running"
            self.totals["swapped_blocks_in"] += sequence["blocks"]
        elif state in ("waiting", "paused") and draw < 0.45:
            sequence["state"] = "running"

    def document(self) -> dict[str, Any]:
        used = sum(s["blocks"] for s in self.sequences if s["state"] != "slow")
        return {
            "model": self.model,
            "policy": self.policy,
            "policy_spec": self.policy,
            "num_sequences": len(self.sequences),
            "num_unstarted": sum(s["computed_tokens"] == 0 for s in self.sequences),
            "blocks": {
                "fast": {"total": 640, "used": min(640, used), "cached": min(90, 640 - used)},
                "slow": {
                    "total": 256,
                    "used": sum(s["blocks"] for s in self.sequences if s["state"] == "slow"),
                },
            },
            "prefix_tokens": self.prefix,
            "totals": dict(self.totals),
            "preemptions": dict(self.preemptions),
            "step_seconds": 0.041 + 0.006 * self._random.random(),
            "sequences": [dict(s) for s in self.sequences[:256]],
            "recent_preemptions": self.recent,
        }


class FakeServer:
    """Of the fake engines; what it has been asked to do is in `asked`."""

    def __init__(self, num_sequences: int = 22, policy: str = "mlfq") -> None:
        self.engines = [
            FakeEngine("smollm2-135m-instruct", policy, num_sequences, 1),
            FakeEngine("qwen2.5-0.5b-instruct", "boost", 9, 2),
        ]
        self.is_draining = False
        self.is_key_wrong = False
        self.url = ""
        self.asked: list[tuple[str, Any]] = []
        self.models: list[dict[str, Any]] = [
            self._model("smollm2-135m-instruct", 0.21, aliases=["chat"], version="3", is_pinned=True),
            self._model("qwen2.5-0.5b-instruct", 0.62, version="1"),
            self._model("all-minilm-l6-v2", 0.09, task="embed", idle_seconds=341.0),
            self._model(
                "llama-3.2-1b-instruct",
                0.0,
                state="unloaded",
                error="needs 1.3 GiB, 1.1 GiB are available; unloading qwen2.5-0.5b-instruct gives 0.6 GiB",
            ),
        ]
        self._start = self._time = time.time() - 0.5
        self._lock = threading.Lock()
        self._num_ends = 0
        self.admin_key = ADMIN_KEY
        self.app = self._make_app()

    @staticmethod
    def _model(name: str, gib: float, **changes: Any) -> dict[str, Any]:
        return {
            "name": name,
            "aliases": [],
            "version": None,
            "state": "loaded",
            "is_pinned": False,
            "memory_bytes": int(gib * GIB),
            "num_requests": 3,
            "idle_seconds": None,
            "task": "generate",
            "error": None,
            **changes,
        }

    def end_streams(self) -> None:
        """As a server does that goes away."""
        self._num_ends += 1

    def run(self, seconds: float, interval: float = 0.5) -> list[dict[str, Any]]:
        """Statuses of so long, at once."""
        return [self.status(interval) for _ in range(int(seconds / interval))]

    def status(self, seconds: float | None = None) -> dict[str, Any]:
        with self._lock:
            now = time.time() if seconds is None else self._time + seconds
            for engine in self.engines:
                engine.step(now - self._time, now)
            self._time = now
            return self._document(now)

    def _document(self, now: float) -> dict[str, Any]:
        used = sum(model["memory_bytes"] for model in self.models)
        return {
            "time": now,
            "uptime_seconds": now - self._start + 8000,
            "version": "0.1.0",
            "is_draining": self.is_draining,
            "num_requests": 3,
            "memory": {"resident_bytes": int(1.15 * GIB + 2e7 * random.random())},
            "energy": {"watts": 31.0 + 4 * random.random()},
            "models": self.models,
            "model_memory": {"budget_bytes": 2 * GIB, "used_bytes": used},
            "engines": [engine.document() for engine in self.engines],
            "latencies": [
                {
                    "model": engine.model,
                    "time_to_first_token_seconds": {"bounds": FIRST_BOUNDS, "counts": list(engine.first)},
                    "time_per_output_token_seconds": {"bounds": NEXT_BOUNDS, "counts": list(engine.next)},
                }
                for engine in self.engines
            ],
            "tenants": [
                {
                    "name": name,
                    "weight": weight,
                    "num_running": 3,
                    "requests": 120,
                    "prompt_tokens": 48_211,
                    "completion_tokens": 1_204_551,
                    "service_seconds": sum(engine.service[name] for engine in self.engines),
                    "joules": 812.4,
                    "refused": 4,
                }
                for name, weight in TENANTS.items()
            ],
        }

    def _make_app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(dashboard_router(None))  # type: ignore[arg-type]

        @app.get("/v1/models")
        async def models() -> Response:
            data = [{"id": m["name"], "task": m["task"], "context_length": 2048} for m in self.models]
            return JSONResponse({"object": "list", "data": data})

        def refuse(request: Request) -> Response | None:
            if request.headers.get("authorization") == f"Bearer {self.admin_key}":
                return None
            error = {"message": "there is nothing at /admin", "type": "x", "param": None, "code": "not_found"}
            return JSONResponse({"error": error}, 404)

        @app.get("/admin/status")
        async def status(request: Request) -> Response:
            return refuse(request) or JSONResponse(self.status())

        @app.get("/admin/events")
        async def events(request: Request, interval_seconds: float) -> Response:
            async def stream() -> AsyncIterator[str]:
                num_ends = self._num_ends
                while num_ends == self._num_ends:
                    yield f"data: {json.dumps(self.status())}\n\n"
                    await asyncio.sleep(interval_seconds)

            return refuse(request) or StreamingResponse(stream(), media_type="text/event-stream")

        @app.get("/admin/policies")
        async def policies(request: Request) -> Response:
            return refuse(request) or JSONResponse({"policies": [asdict(p) for p in describe_policies()]})

        @app.get("/admin/usage.csv")
        async def usage(request: Request) -> Response:
            return refuse(request) or PlainTextResponse("tenant,requests\nchat,1\n", media_type="text/csv")

        @app.post("/admin/{action:path}")
        async def act(action: str, request: Request) -> Response:
            body = json.loads(await request.body() or b"{}")
            self.asked.append((action, body))
            return refuse(request) or self._do(action, body)

        return app

    def _do(self, action: str, body: Any) -> Response:
        if action == "drain":
            self.is_draining = body["is_draining"]
        if action == "models/load" and body["model"].startswith("llama"):
            message = "llama-3.2-1b-instruct needs 1.3 GiB, 1.1 GiB are available"
            error = {"message": message, "type": "invalid_request_error", "param": "model", "code": "memory"}
            return JSONResponse({"error": error}, 409)
        if action == "models/unload":
            model = next(m for m in self.models if m["name"] == body["model"])
            model.update(state="unloaded", memory_bytes=0, num_requests=0)
        return JSONResponse({"ok": True})


@contextmanager
def faking(server: FakeServer) -> Iterator[str]:
    """Serve it from a thread; the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(server.app, log_config=None, log_level="critical", lifespan="off")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        runner.should_exit = runner.force_exit = True
        thread.join(20)
        listener.close()
