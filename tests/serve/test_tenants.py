"""Tenants over HTTP: their limits, what they have had, and reloads of their keys."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections import Counter
from pathlib import Path

import httpx
import pytest

from fastserve.config import EngineOptions
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.key_file import Terms, add_admin_key, add_key, digest_of
from fastserve.serve.options import ServeOptions
from fastserve.serve.tenant_table import TenantTable
from serve.conftest import STORIES, events

pytest.importorskip("fastserve._native")

MESSAGES = [{"role": "user", "content": "Hello"}]
BODIES = {
    "/v1/completions": {"prompt": "He", "max_tokens": 4},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 4},
}


class Guarded:
    """A server whose keys are in a file, with an admin key."""

    def __init__(self, make_server, folder: Path, **tenants: Terms) -> None:
        self.path = folder / "keys"
        self.keys = {name: add_key(self.path, name, terms=terms) for name, terms in tenants.items()}
        self._admin = add_admin_key(folder / "admin")
        options = ServeOptions(tenants=str(self.path), admin_key_file=str(folder / "admin"))
        engine = EngineOptions(threads=1, context_length=256, kv_memory="1MiB", max_sequences=6)
        self.server = make_server(options, engine, keys=ApiKeys.load(options))
        self.tenants: TenantTable = self.server.app.state.service.tenants

    def headers(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self._admin if name == 'admin' else self.keys[name]}"}

    def post(self, name: str, path: str = "/v1/completions", **fields) -> httpx.Response:
        body = {"model": STORIES, **BODIES.get(path, {}), **fields}
        return self.server.post(path, body, headers=self.headers(name))

    def admin(self, path: str) -> httpx.Response:
        return self.server.get(f"/admin/{path}", headers=self.headers("admin"))

    def reload(self) -> httpx.Response:
        return self.server.post("/admin/tenants/reload", None, headers=self.headers("admin"))

    def usage(self, name: str) -> dict:
        return next(row for row in self.admin("usage").json()["tenants"] if row["name"] == name)


@pytest.fixture
def guarded(make_server, tmp_path):
    return lambda **tenants: Guarded(make_server, tmp_path, **tenants)


def refusal(response: httpx.Response) -> dict:
    assert response.status_code == 429, response.text
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    return error


@pytest.mark.parametrize("path", BODIES)
def test_a_tenant_over_its_rate_of_requests_is_refused_and_the_others_are_not(guarded, path: str) -> None:
    site = guarded(a=Terms(requests_per_minute=2), b=Terms())
    for _ in range(2):
        assert site.post("a", path).status_code == 200
    error = refusal(site.post("a", path))
    assert "of tenant 'a' requests_per_minute is 2" in error["message"]
    assert site.post("b", path).status_code == 200
    refusal(site.server.get("/v1/models", headers=site.headers("a")))
    assert site.usage("a")["refused"] == 2
    assert site.usage("a")["requests"] == 2


def test_what_gives_up_work_is_never_refused_by_a_rate(guarded) -> None:
    site = guarded(a=Terms(requests_per_minute=1))
    response_id = site.post("a", "/v1/responses").json()["id"]
    refusal(site.post("a", "/v1/responses"))
    headers = site.headers("a")
    assert site.server.post(f"/v1/responses/{response_id}/cancel", None, headers=headers).status_code == 200
    deleted = site.server.run(site.server.client.delete(f"/v1/responses/{response_id}", headers=headers))
    assert deleted.status_code == 200


def test_keys_of_one_tenant_have_its_limits_together(guarded) -> None:
    site = guarded(a=Terms(requests_per_minute=2))
    site.keys["second"] = add_key(site.path, "second", tenant="a")
    assert site.reload().json() == {"num_keys": 2, "num_tenants": 1}
    assert site.post("a").status_code == 200
    assert site.post("second").status_code == 200
    refusal(site.post("second"))
    assert site.usage("a")["requests"] == 2


def test_a_tenant_over_its_rate_of_tokens_is_refused(guarded) -> None:
    site = guarded(a=Terms(tokens_per_minute=100))
    response = site.post("a", max_tokens=40, ignore_eos=True)
    assert response.status_code == 200
    used = response.json()["usage"]["total_tokens"]
    error = refusal(site.post("a", max_tokens=80))
    assert f"tokens_per_minute is 100, of which {100 - used} are left" in error["message"]
    assert site.usage("a")["refused"] == 1


@pytest.mark.parametrize("path", BODIES)
def test_a_smaller_request_is_taken_right_after_one_that_asks_for_too_many_tokens(guarded, path: str) -> None:
    site = guarded(a=Terms(tokens_per_minute=200))
    name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    assert site.post("a", path).status_code == 200
    for _ in range(2):
        refusal(site.post("a", path, **{name: 200}))
        assert site.post("a", path).status_code == 200


def test_tokens_that_were_asked_for_and_not_used_come_back(guarded) -> None:
    site = guarded(a=Terms(tokens_per_minute=200))
    for _ in range(3):
        assert site.post("a", max_tokens=180, stop_token_ids=list(range(1, 17))).status_code in (200, 429)
    (tenant,) = site.admin("tenants").json()["tenants"]
    usage = site.usage("a")
    taken = usage["prompt_tokens"] + usage["completion_tokens"]
    assert tenant["tokens_left"] == pytest.approx(200 - taken, abs=10)  # a second has filled three


def test_what_the_engine_refuses_costs_no_tokens(guarded) -> None:
    site = guarded(a=Terms(tokens_per_minute=1000))
    assert site.post("a", max_tokens=600).status_code == 400  # beyond the context
    (tenant,) = site.admin("tenants").json()["tenants"]
    assert tenant["tokens_left"] == 1000
    assert site.usage("a")["requests"] == 0
    assert site.usage("a")["prompt_tokens"] == 0


def test_no_more_requests_of_a_tenant_are_under_way_than_may_be(guarded) -> None:
    site = guarded(a=Terms(max_concurrent=2), b=Terms())

    async def main() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        client = site.server.client

        def post(name: str, max_tokens: int):
            body = {"model": STORIES, "prompt": "He", "max_tokens": max_tokens, "ignore_eos": True}
            return client.post("/v1/completions", json=body, headers=site.headers(name))

        running = [asyncio.create_task(post("a", 200)) for _ in range(2)]
        while site.tenants.find("a").num_running < 2:
            await asyncio.sleep(0)
        extra = [await post("a", 2), await post("b", 2)]
        models = await client.get("/v1/models", headers=site.headers("a"))
        assert models.status_code == 200
        return extra, *[await task for task in running]

    (refused, other), first, second = site.server.run(main())
    assert "2 of its requests are under way; max_concurrent is 2" in refusal(refused)["message"]
    assert other.status_code == first.status_code == 200
    assert second.json()["usage"]["completion_tokens"] == 200
    assert site.usage("a")["num_running"] == 0
    assert site.post("a").status_code == 200


def test_a_response_in_the_background_has_its_place_until_it_ends(guarded) -> None:
    site = guarded(a=Terms(max_concurrent=1))
    options = {"background": True, "max_output_tokens": 200}
    started = site.post("a", "/v1/responses", **options)
    assert started.status_code == 200
    refusal(site.post("a"))
    path = f"/v1/responses/{started.json()['id']}"
    assert site.server.post(f"{path}/cancel", None, headers=site.headers("a")).status_code == 200

    async def until_it_has_ended() -> None:
        while site.tenants.find("a").num_running:
            await asyncio.sleep(0.001)

    site.server.run(until_it_has_ended())
    assert site.post("a").status_code == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_usage_has_the_tokens_of_answers_and_seconds_of_service(guarded, path: str, stream: bool) -> None:
    site = guarded(a=Terms(), b=Terms())
    response = site.post("a", path, stream=stream)
    assert response.status_code == 200
    usage = site.usage("a")
    assert usage["requests"] == 1
    assert 1 <= usage["completion_tokens"] <= 4
    assert usage["prompt_tokens"] >= 1
    assert usage["service_seconds"] > 0
    if path == "/v1/completions" and not stream:
        told = response.json()["usage"]
        assert {name: usage[name] for name in ("prompt_tokens", "completion_tokens")} == {
            name: told[name] for name in ("prompt_tokens", "completion_tokens")
        }
    assert site.usage("b")["requests"] == 0


def test_what_is_given_up_has_been_served_too(guarded) -> None:
    site = guarded(a=Terms())

    async def main() -> None:
        client = site.server.client
        body = {"model": STORIES, "prompt": "He", "max_tokens": 200, "ignore_eos": True}
        task = asyncio.create_task(client.post("/v1/completions", json=body, headers=site.headers("a")))
        while not (await site.server.llm.status()).steps.num_tokens.total:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await site.server.llm.status()

    site.server.run(main())
    usage = site.usage("a")
    assert usage["service_seconds"] > 0
    assert usage["prompt_tokens"] > 0
    assert usage["num_running"] == 0


def test_seconds_of_service_are_those_of_the_engines_steps(guarded) -> None:
    site = guarded(a=Terms(), b=Terms())
    for name in "abab":
        assert site.post(name, max_tokens=30, n=2, ignore_eos=True).status_code == 200
    steps = site.server.run(site.server.llm.status()).steps
    seconds = steps.schedule_seconds.total + steps.run_seconds.total
    served = sum(site.usage(name)["service_seconds"] for name in "ab")
    assert served == pytest.approx(seconds, rel=1e-3)


def test_usage_is_told_as_json_as_csv_and_as_metrics(guarded) -> None:
    site = guarded(a=Terms(weight=2.0), b=Terms())
    site.post("a")
    document = site.admin("usage").json()
    assert document["since"] < document["time"]
    assert document["energy"].keys() == {"watts", "joules"}
    response = site.admin("usage.csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(response.text)))
    assert [row["name"] for row in rows] == ["a", "b"]
    for row, same in zip(rows, document["tenants"], strict=True):
        assert row == {name: "" if value is None else str(value) for name, value in same.items()}
    metrics = site.server.get("/metrics", headers=site.headers("admin")).text
    tokens = document["tenants"][0]["completion_tokens"]
    assert f'fastserve_tenant_completion_tokens_total{{tenant="a"}} {float(tokens)}' in metrics


def test_a_tenant_sees_in_metrics_itself_alone(guarded) -> None:
    site = guarded(a=Terms(), b=Terms())
    seen = {
        name: [
            tenant
            for tenant in "ab"
            if f'tenant="{tenant}"' in site.server.get("/metrics", headers=site.headers(name)).text
        ]
        for name in ("a", "b", "admin")
    }
    assert seen == {"a": ["a"], "b": ["b"], "admin": ["a", "b"]}


def test_a_tenant_sees_itself_alone_also_where_there_is_no_admin_key(make_server) -> None:
    keys = ApiKeys({name: digest_of(f"fs-{name}") for name in "ab"})
    server = make_server(keys=keys)
    for name, other in ("ab", "ba"):
        text = server.get("/metrics", headers={"x-api-key": f"fs-{name}"}).text
        assert f'tenant="{name}"' in text
        assert f'tenant="{other}"' not in text


def test_the_schema_of_the_api_tells_of_admin_to_who_has_its_key_alone(guarded) -> None:
    site = guarded(a=Terms())
    schemas = {
        name: site.server.get("/openapi.json", headers=site.headers(name)).json() for name in ("a", "admin")
    }
    told = {name: [path for path in s["paths"] if path.startswith("/admin")] for name, s in schemas.items()}
    assert told["a"] == []
    assert "/admin/drain" in told["admin"]
    assert set(schemas["admin"]["paths"]) == {*schemas["a"]["paths"], *told["admin"]}
    assert "DrainRequest" in schemas["admin"]["components"]["schemas"]
    assert "DrainRequest" not in schemas["a"]["components"]["schemas"]
    assert site.server.get("/openapi.json").status_code == 401


def test_without_keys_all_usage_is_anonymous(make_server) -> None:
    server = make_server()
    assert server.post("/v1/completions", {"model": STORIES, "prompt": "He", "user": "x"}).status_code == 200
    metrics = server.get("/metrics").text
    assert 'fastserve_tenant_requests_total{tenant="anonymous"} 1.0' in metrics
    assert 'tenant="x"' not in metrics


def test_tenants_are_listed_with_their_terms_and_without_digests(guarded) -> None:
    terms = Terms(weight=2.0, requests_per_minute=60, tokens_per_minute=6000, max_concurrent=8)
    site = guarded(a=terms)
    response = site.admin("tenants")
    assert response.json() == {
        "tenants": [
            {
                "name": "a",
                "weight": 2.0,
                "requests_per_minute": 60,
                "tokens_per_minute": 6000,
                "max_concurrent": 8,
                "num_running": 0,
                "requests_left": 60,
                "tokens_left": 6000,
                "keys": [{"name": "a", "expires": None, "has_expired": False}],
            }
        ]
    }
    assert digest_of(site.keys["a"]) not in response.text


def test_a_reload_takes_new_keys_and_terms_and_gives_up_old_keys(guarded) -> None:
    site = guarded(a=Terms(), b=Terms())
    site.post("b")
    lines = site.path.read_text().splitlines()
    site.path.write_text(f"{lines[0]} max_concurrent=3 weight=4\n")
    site.keys["c"] = add_key(site.path, "c")
    assert site.post("c").status_code == 401
    assert site.reload().json() == {"num_keys": 2, "num_tenants": 2}
    assert site.post("c").status_code == 200
    assert site.post("b").json()["error"]["code"] == "invalid_api_key"
    tenants = {tenant["name"]: tenant for tenant in site.admin("tenants").json()["tenants"]}
    assert (tenants["a"]["weight"], tenants["a"]["max_concurrent"]) == (4.0, 3)
    assert tenants["b"]["keys"] == []
    assert site.usage("b")["requests"] == 1  # what it had is not forgotten


def test_who_watches_by_an_admin_key_that_is_replaced_sees_no_more(guarded) -> None:
    """And who watches by the new one goes on, whatever else is read again."""
    site = guarded(a=Terms())

    async def main() -> None:
        client, path = site.server.client, "/admin/events?interval_seconds=0.1"

        def watch() -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(client.get(path, headers=site.headers("admin")))

        old = watch()
        await asyncio.sleep(0.3)
        (site.path.parent / "admin").unlink()
        site._admin = add_admin_key(site.path.parent / "admin")
        await site.tenants.reload([])
        assert len(events(await asyncio.wait_for(old, 10))) >= 1
        new = watch()
        await asyncio.sleep(0.3)
        await site.tenants.reload([])
        await asyncio.sleep(0.3)
        assert not new.done()
        site.server.app.state.service.snapshots.close()
        assert len(events(await asyncio.wait_for(new, 10))) >= 2

    site.server.run(main())


def test_a_mistake_in_a_file_that_is_reloaded_is_told_by_line_and_all_stays(guarded) -> None:
    site = guarded(a=Terms(), b=Terms())
    text = site.path.read_text()
    site.path.write_text(text.replace("\n", " wieght=2\n", 1))
    response = site.reload()
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "invalid_key_file"
    assert f"{site.path}, line 1: has the unknown field 'wieght'" in error["message"]
    for name in "ab":
        assert site.post(name).status_code == 200


def test_without_a_file_there_is_nothing_to_reload(make_server, tmp_path) -> None:
    key = add_admin_key(tmp_path / "admin")
    options = ServeOptions(admin_key_file=str(tmp_path / "admin"))
    server = make_server(options, keys=ApiKeys.load(options))
    response = server.post("/admin/tenants/reload", None, headers={"x-api-key": key})
    assert response.json()["error"]["code"] == "no_key_file"


def test_weights_of_the_file_are_the_engines_also_after_a_reload(guarded) -> None:
    site = guarded(a=Terms(weight=2.0), b=Terms())
    engine = site.server.llm._worker._engine

    def weights() -> dict[str, float]:
        site.server.run(site.server.llm.status())
        return dict(engine.scheduler._precedence._tenants._weights)

    assert weights() == {}
    site.post("b")  # the first request tells the engine
    assert weights() == {"a": 2.0, "b": 1.0}
    site.path.write_text(site.path.read_text().replace("weight=2", "weight=5"))
    assert site.reload().status_code == 200
    assert weights() == {"a": 5.0, "b": 1.0}


def test_two_tenants_that_both_want_all_are_served_by_their_weights(guarded) -> None:
    site = guarded(heavy=Terms(weight=2.0), light=Terms())
    before = Counter({name: site.usage(name)["completion_tokens"] for name in ("heavy", "light")})

    async def main() -> None:
        client = site.server.client
        llm = site.server.llm

        async def go_on(name: str) -> None:
            while True:
                body = {"model": STORIES, "prompt": "Once upon", "max_tokens": 100, "ignore_eos": True}
                await client.post("/v1/completions", json=body, headers=site.headers(name))
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(go_on(name)) for name in ("heavy", "light") for _ in range(12)]
        while (await llm.status()).steps.num_tokens.total < 6000:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    site.server.run(main())
    had = {name: site.usage(name)["completion_tokens"] - before[name] for name in before}
    assert had["heavy"] / had["light"] == pytest.approx(2.0, rel=0.1)


def test_requests_that_are_refused_are_logged_with_their_tenant(guarded, caplog) -> None:
    site = guarded(a=Terms(requests_per_minute=1))
    site.post("a")
    caplog.set_level("INFO", logger="fastserve.serve.request")
    refusal(site.post("a"))
    line = caplog.records[-1].fields
    assert (line["status"], line["key"], line["tenant"]) == (429, "a", "a")
    assert json.dumps(site.keys["a"]) not in json.dumps(line)
