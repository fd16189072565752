"""/admin: what is told of a server, and how it is steered."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import httpx
import jsonschema
import pytest

from fastserve.config import EngineOptions
from fastserve.engine.policy import POLICY_NAMES
from fastserve.serve.options import ServeOptions
from serve.conftest import STORIES, events
from serve.process import ServerProcess, serving

BODY = {"model": STORIES, "prompt": "He", "max_tokens": 200, "ignore_eos": True}
KEY = "fs-admin-secret"
ADMIN = ServeOptions(admin_key_file="admin.txt")  # whose key it is, is not asked here


@pytest.fixture(scope="module")
def server(make_server):
    return make_server(ADMIN)


async def status_of(server) -> dict[str, Any]:
    return (await server.client.get("/admin/status")).json()


async def wait_for_sequences(server, num: int) -> dict[str, Any]:
    while True:
        status = await status_of(server)
        if len(status["engines"][0]["sequences"]) == num:
            return status
        await asyncio.sleep(0.01)


def test_without_an_admin_key_there_is_nothing_at_admin(make_server) -> None:
    server = make_server()
    for path in ("/admin/status", "/admin/events", "/admin/policies"):
        response = server.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert server.post("/admin/drain", {}).status_code == 404
    assert not [path for path in server.get("/openapi.json").json()["paths"] if "admin" in path]


def test_status_tells_of_requests_by_the_names_that_their_answers_have(server) -> None:
    async def main() -> None:
        asked = [
            asyncio.create_task(
                server.client.post(
                    "/v1/completions",
                    json={**BODY, "user": user},
                    headers={"x-request-id": f"request-of-{user}"},
                )
            )
            for user in ("ann", "bob")
        ]
        status = await wait_for_sequences(server, 2)
        (engine,), (model,) = status["engines"], status["models"]
        assert (engine["model"], model["name"], model["num_requests"]) == (STORIES, STORIES, 2)
        assert {(s["request_id"], s["tenant"]) for s in engine["sequences"]} == {
            ("request-of-ann", "ann"),
            ("request-of-bob", "bob"),
        }
        assert {s["max_tokens"] for s in engine["sequences"]} == {200}
        await asyncio.gather(*asked)
        status = await status_of(server)
        assert status["engines"][0]["sequences"] == []
        totals = status["engines"][0]["totals"]
        assert (totals["completions"], totals["completion_tokens"]) == (2, 400)
        assert status["uptime_seconds"] > 0
        assert status["model_memory"]["used_bytes"] == model["memory_bytes"] > 0

    server.run(main())


def test_events_are_statuses_until_the_server_ends(make_server) -> None:
    server = make_server(ADMIN)

    async def main() -> list[dict[str, Any]]:
        asking = asyncio.create_task(server.client.get("/admin/events?interval_seconds=0.1"))
        await asyncio.sleep(1.5)  # of a machine that may be busy
        server.app.state.service.snapshots.close()
        return list(map(json.loads, events(await asking)))

    got = server.run(main())
    assert 3 <= len(got) <= 17
    assert [d["time"] for d in got] == sorted({d["time"] for d in got})
    assert got[0].keys() == server.get("/admin/status").json().keys()


@pytest.mark.parametrize("interval", ["0.01", "nan", "1e9", "often"])
def test_an_interval_out_of_range_is_refused_by_its_name(server, interval: str) -> None:
    response = server.get(f"/admin/events?interval_seconds={interval}")
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "interval_seconds", "invalid_value")


def test_policies_are_listed_with_their_knobs(server) -> None:
    policies = {policy["name"]: policy for policy in server.get("/admin/policies").json()["policies"]}
    assert tuple(policies) == POLICY_NAMES
    strength = policies["boost"]["knobs"][0]
    assert strength.pop("meaning")
    assert strength == {"name": "strength", "low": 0.0, "high": 100.0, "is_integer": False, "default": 7.0}
    assert policies["fcfs"]["knobs"] == []


def test_the_policy_changes_while_requests_run_and_none_is_lost(server) -> None:
    async def main() -> None:
        asked = [asyncio.create_task(server.client.post("/v1/completions", json=BODY)) for _ in range(4)]
        await wait_for_sequences(server, 4)
        for spec in ("mlfq:growth=4", "fcfs"):
            changed = await server.client.post("/admin/policy", json={"policy": spec, "model": STORIES})
            assert changed.json() == {"policy": spec, "models": [STORIES]}
            status = await status_of(server)
            assert status["engines"][0]["policy_spec"] == spec
        changed = await server.client.post("/admin/policy", json={"policy": "boost"})
        assert changed.json() == {"policy": "boost", "models": [STORIES]}
        for response in await asyncio.gather(*asked):
            assert response.json()["usage"]["completion_tokens"] == 200

    server.run(main())


def test_what_the_admin_changes_is_in_the_log(server, caplog) -> None:
    with caplog.at_level(logging.INFO, "fastserve.serve.request"):
        server.post("/admin/policy", {"policy": "fcfs", "model": STORIES})
        server.post("/admin/drain", {"is_draining": False})
    policy, drain = (record.fields for record in caplog.records[-2:])
    assert (policy["path"], policy["policy"], policy["model"]) == ("/admin/policy", "fcfs", STORIES)
    assert (drain["path"], drain["is_draining"]) == ("/admin/drain", False)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"policy": "lifo"}, 400, "policy"),
        ({"policy": "boost:strength=1e9"}, 400, "policy"),
        ({"policy": "boost:least_scale_seconds=9,most_scale_seconds=1"}, 400, "policy"),
        ({"policy": "boost", "model": "other"}, 404, "model"),
        ({"policy": 7}, 400, "policy"),
        ({}, 400, "policy"),
        ({"policy": "boost", "knobs": {}}, 400, "knobs"),
    ],
)
def test_a_wrong_policy_is_refused_and_the_old_one_stays(server, body, status: int, param: str) -> None:
    before = server.get("/admin/status").json()["engines"][0]["policy_spec"]
    response = server.post("/admin/policy", body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert server.get("/admin/status").json()["engines"][0]["policy_spec"] == before


def test_a_server_that_drains_ends_what_runs_and_takes_nothing_new(make_server) -> None:
    server = make_server(ADMIN, EngineOptions(threads=1, context_length=256, kv_memory="1MiB"))

    async def main() -> None:
        post, get = server.client.post, server.client.get
        running = asyncio.create_task(post("/v1/completions", json=BODY))
        background = await post(
            "/v1/responses", json={"model": STORIES, "input": "He", "background": True, "store": True}
        )
        await wait_for_sequences(server, 2)
        drained = await post("/admin/drain")
        assert drained.json() == {"is_draining": True, "num_requests": 2}
        for path in (
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/embeddings",
            "/tokenize",
            "/v1/messages",
        ):
            refused = await post(path, json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.headers["retry-after"] == "1"
        ready = await get("/health/ready")
        assert (ready.status_code, list(ready.json()["reasons"])) == (503, ["server"])
        for path in ("/health/live", "/v1/models", "/metrics", "/admin/status"):
            assert (await get(path)).status_code == 200
        assert (await status_of(server))["is_draining"] is True
        assert (await running).json()["usage"]["completion_tokens"] == 200
        response_id = background.json()["id"]
        assert (await get(f"/v1/responses/{response_id}")).status_code == 200
        assert (await post(f"/v1/responses/{response_id}/cancel", json={})).status_code == 200
        await wait_for_sequences(server, 0)
        undone = await post("/admin/drain", json={"is_draining": False})
        assert undone.json() == {"is_draining": False, "num_requests": 0}
        assert (await get("/health/ready")).status_code == 200
        assert (await post("/v1/completions", json={**BODY, "max_tokens": 2})).status_code == 200

    server.run(main())


@pytest.fixture(scope="module")
def process(stories_for_chat, tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("admin")
    key_file = folder / "admin.txt"
    key_file.write_text(f"admin {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    options = ("--threads", "1", "--kv-memory", "1MiB", "--admin-key-file", str(key_file))
    with serving(stories_for_chat, folder / "log", *options) as process:
        yield process


def top(process: ServerProcess, *options: str) -> str:
    command = [sys.executable, "-m", "fastserve.cli.main", "top", "--url", process.url, *options]
    environment = {**os.environ, "FASTSERVE_ADMIN_KEY": KEY}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@contextmanager
def under_load(process: ServerProcess) -> Iterator[None]:
    """Requests of a tenant follow one another."""
    is_over = Event()

    def ask(number: int) -> None:
        headers = {"x-request-id": f"request-of-ann-{number}"}
        body = {**BODY, "max_tokens": 400, "n": 4, "user": "ann"}
        while not is_over.is_set():
            httpx.post(f"{process.url}/v1/completions", json=body, headers=headers, timeout=60)

    threads = [Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_the_terminal_shows_what_a_real_server_does(process) -> None:
    with under_load(process):
        shown = top(process)
        while "ann" not in shown:
            shown = top(process)
        document = json.loads(top(process, "--json"))
    assert f"{STORIES}   policy boost" in shown
    assert "request-of-ann-" in shown
    assert document["engines"][0]["model"] == STORIES


def test_what_is_answered_is_what_the_schema_says(process) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    with under_load(process), httpx.Client(base_url=process.url, headers=headers, timeout=60) as client:
        schema = client.get("/openapi.json").json()
        status = client.get("/admin/status").json()
        while not (status["engines"][0]["sequences"] and status["engines"][0]["recent_preemptions"]):
            status = client.get("/admin/status").json()
        answers = {
            ("get", "/admin/status"): status,
            ("get", "/admin/policies"): client.get("/admin/policies").json(),
            ("post", "/admin/policy"): client.post("/admin/policy", json={"policy": "boost"}).json(),
            ("post", "/admin/drain"): client.post("/admin/drain", json={"is_draining": False}).json(),
        }
    assert {path for path in schema["paths"] if path.startswith("/admin/")} >= {path for _, path in answers}
    for (method, path), document in answers.items():
        own = schema["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(document, {**own, "components": schema["components"]})
        (name,) = own["$ref"].rsplit("/", 1)[1:]
        assert document.keys() == schema["components"]["schemas"][name]["properties"].keys()


def test_a_server_that_is_told_to_end_does_not_wait_for_who_watches(process) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    address = f"{process.url}/admin/events?interval_seconds=60"
    with httpx.stream("GET", address, headers=headers, timeout=60) as response:
        received = response.iter_bytes()
        assert next(received).startswith(b'data: {"time":')
        started = time.monotonic()
        assert process.terminate() == 0
        assert time.monotonic() - started < 10  # drain_seconds is 30
        assert b"".join(received) == b""
