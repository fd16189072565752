"""/admin: what is told of a server, and how it is steered."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fastserve.config import EngineOptions
from fastserve.engine.policy import POLICY_NAMES
from fastserve.serve.options import ServeOptions
from serve.conftest import STORIES, events

BODY = {"model": STORIES, "prompt": "He", "max_tokens": 200, "ignore_eos": True}
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
        await asyncio.sleep(0.5)
        server.app.state.service.snapshots.close()
        return list(map(json.loads, events(await asking)))

    got = server.run(main())
    assert 3 <= len(got) <= 7
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
