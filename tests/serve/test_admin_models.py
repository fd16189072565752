"""Models that come and go under HTTP: on demand, by /admin/models, in metrics, with streams that run."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.app import create_app
from fastserve.serve.key_file import digest_of
from fastserve.serve.model_loading import find_models
from fastserve.serve.options import ServeOptions
from fastserve.serve.routes import chat_completions
from serve.conftest import ADMIN_KEY, CHAT_TEMPLATE, OPTIONS
from serve.test_health import samples

pytest.importorskip("fastserve._native")

T = TypeVar("T")
ONE = 100 * 2**20  # holds one of the models, each of which takes some 66 MiB
BODY = {"prompt": "He", "max_tokens": 4, "ignore_eos": True, "temperature": 0}


class Server:
    """A server of models `one` and `two`, of which memory holds one."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        serve_options = ServeOptions(**{"model_memory": ONE, "admin_key_file": "admin", **options})
        names = [str(folder / "one"), str(folder / "two")]
        self.models = find_models(names, serve_options, replace(OPTIONS, max_waiting=64))
        self.models.set_up()
        is_admin = serve_options.admin_key_file is not None
        keys = ApiKeys({}, admin_digest=digest_of(ADMIN_KEY) if is_admin else None)
        app = create_app(self.models, serve_options, keys=keys)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers={"x-api-key": ADMIN_KEY}, timeout=60
        )

    def run(self, awaitable: Awaitable[T]) -> T:
        async def main() -> T:
            return await awaitable

        return self.loop.run_until_complete(asyncio.wait_for(main(), 60))

    def get(self, path: str) -> httpx.Response:
        return self.run(self.client.get(path))

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.run(self.client.post(path, json=body))

    def states(self) -> dict[str, str]:
        return {model["name"]: model["state"] for model in self.get("/admin/models").json()["models"]}

    def close(self) -> None:
        async def settle() -> None:
            while any(entry.num_uses for entry in self.models.entries):
                await asyncio.sleep(0.01)

        self.run(settle())
        self.run(self.client.aclose())
        self.run(self.models.close())
        self.loop.close()


@pytest.fixture(scope="module")
def folder(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name in ("one", "two"):
        shutil.copytree(stories, folder / name)
        (folder / name / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    yield server
    server.close()


def test_two_models_in_memory_that_holds_one_both_answer_everybody(server) -> None:
    async def main() -> list[httpx.Response]:
        bodies = [{"model": ("one", "two")[i % 2], "stream": i % 3 == 0, **BODY} for i in range(40)]
        return await asyncio.gather(*(server.client.post("/v1/completions", json=body) for body in bodies))

    responses = server.run(main())
    assert [response.status_code for response in responses] == [200] * 40
    texts = set()
    for response in responses:
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
        if len(lines) > 1:
            assert lines[-2] == "[DONE]"
            texts.add("".join(json.loads(line)["choices"][0]["text"] for line in lines[:-2]))
        else:
            texts.add(response.json()["choices"][0]["text"])
    assert len(texts) == 1
    got = samples(server)
    assert got["fastserve_models", "loaded"] == got["fastserve_models", "unloaded"] == 1
    assert sum(value for key, value in got.items() if key[0] == "fastserve_model_loads_total") >= 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", BODY),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [5, 6]}),
        ("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_each_route_has_its_model_loaded_and_lets_it_go(server, path, body) -> None:
    for name in ("one", "two"):
        response = server.post(path, model=name, **body)
        assert response.status_code == 200, response.text
        assert server.states()[name] == "loaded"
    assert [entry.num_uses for entry in server.models.entries] == [0, 0]
    assert server.post("/v1/embeddings", model="one", input="Hi").status_code == 400
    assert server.states() == {"one": "unloaded", "two": "loaded"}  # not loaded to be refused


def test_a_model_is_kept_until_its_stream_has_ended(server) -> None:
    async def main() -> str:
        body = {"model": "one", "stream": True, **BODY, "max_tokens": 200}
        async with server.client.stream("POST", "/v1/completions", json=body) as response:
            other = asyncio.create_task(server.client.post("/v1/completions", json={"model": "two", **BODY}))
            text = "".join([part async for part in response.aiter_text()])
        assert (await other).status_code == 200
        return text

    text = server.run(main())
    assert text.endswith("data: [DONE]\n\n")
    assert '"error"' not in text
    assert server.states() == {"one": "unloaded", "two": "loaded"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_keeps_its_model_when_that_is_not_served_any_more(server, monkeypatch, stream) -> None:
    make_prompt = chat_completions.make_chat_prompt

    async def forget_and_make(*arguments: Any, **options: Any) -> Any:
        server.models.memory.forget(server.models._entries.pop("one"))
        return await make_prompt(*arguments, **options)

    monkeypatch.setattr(chat_completions, "make_chat_prompt", forget_and_make)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100, "ignore_eos": True}
    response = server.post("/v1/chat/completions", model="one", stream=stream, **body)
    assert response.status_code == 200, response.text
    assert "length" in response.text
    assert "error" not in response.text
    assert server.states() == {"two": "unloaded"}


def test_a_response_in_the_background_keeps_its_model_too(server) -> None:
    started = server.post("/v1/responses", model="one", input="Hi", max_output_tokens=100, background=True)
    assert server.post("/v1/completions", model="two", **BODY).status_code == 200
    ended = server.get(f"/v1/responses/{started.json()['id']}").json()
    assert ended["status"] in ("completed", "incomplete")


def test_an_administrator_loads_and_unloads(server) -> None:
    response = server.post("/admin/models/load", model="two")
    assert (response.status_code, response.json()["state"]) == (200, "loaded")
    document = server.get("/admin/models").json()
    two = document["models"][1]
    assert two["num_loads"] == 1
    assert two["idle_seconds"] >= 0
    assert document["model_memory"] == {"budget_bytes": ONE, "used_bytes": two["memory_bytes"]}
    for _ in range(2):
        response = server.post("/admin/models/unload", model="two")
        assert (response.status_code, response.json()["state"]) == (200, "unloaded")
    assert server.post("/admin/models/load", model="three").status_code == 404
    assert server.post("/admin/models/unload", model=3).status_code == 400


def test_pinned_models_stay(folder) -> None:
    server = Server(folder, model_memory=2 * ONE, pinned=["one"])
    assert server.states() == {"one": "loaded", "two": "unloaded"}
    refused = server.post("/admin/models/unload", model="one")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_pinned")
    server.close()


def test_without_an_admin_key_there_is_nothing_to_administrate(folder) -> None:
    server = Server(folder, admin_key_file=None)
    assert server.get("/admin/models").status_code == 404
    assert server.post("/admin/models/load", model="one").status_code == 404
    server.close()


def test_models_that_are_not_loaded_are_listed_as_others_are(server) -> None:
    listed = server.get("/v1/models").json()["data"]
    assert [(model["id"], model["root"], model["task"]) for model in listed] == [
        ("one", "one", "generate"),
        ("two", "two", "generate"),
    ]
    assert server.get("/v1/models/two").json()["context_length"] == OPTIONS.context_length
    assert server.states() == {"one": "unloaded", "two": "unloaded"}


def test_who_waits_for_a_model_longer_than_may_be_is_told_so(folder) -> None:
    server = Server(folder, model_wait_seconds=0.1, model_turn_seconds=60)
    server.post("/admin/models/load", model="one")  # which may take longer than that
    long = {"model": "one", **BODY, "max_tokens": 250, "n": 8}

    async def main() -> tuple[httpx.Response, ...]:
        running = asyncio.create_task(server.client.post("/v1/completions", json=long))
        while not server.models.find("one").num_uses:
            await asyncio.sleep(0.001)
        entry = server.models.find("one")
        entry.hold()  # it stays in use
        late = await server.client.post("/v1/completions", json={"model": "two", **BODY})
        soon = {"model": "two", **BODY, "timeout_ms": 20}
        sooner = await server.client.post("/v1/completions", json=soon)
        wrong = await server.client.post("/v1/completions", json={**soon, "timeout_ms": 0})
        entry.let_go()
        return await running, late, sooner, wrong

    running, late, sooner, wrong = server.run(main())
    assert [r.status_code for r in (running, late, sooner, wrong)] == [200, 503, 408, 400]
    assert late.json()["error"]["code"] == "model_not_loaded"
    assert late.headers["retry-after"]
    assert sooner.json()["error"]["code"] == "deadline_exceeded"
    assert wrong.json()["error"]["param"] == "timeout_ms"
    server.close()


def test_a_model_that_cannot_be_loaded_any_more_is_refused_with_why(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    server = Server(tmp_path / "copy")
    (tmp_path / "copy" / "two" / "config.json").write_text("{")
    refused = server.post("/v1/completions", model="two", **BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_loaded")
    assert "is not valid JSON" in refused.json()["error"]["message"]
    assert "is not valid JSON" in server.get("/admin/models").json()["models"][1]["error"]
    assert server.post("/v1/completions", model="one", **BODY).status_code == 200
    assert samples(server)
    server.close()


def test_the_server_is_healthy_while_nothing_is_loaded(server) -> None:
    assert server.get("/health/live").status_code == server.get("/health/ready").status_code == 200
    server.post("/v1/completions", model="one", **BODY)
    assert samples(server)[("fastserve_kv_blocks",)] > 0
    server.post("/admin/models/unload", model="one")
    got = samples(server)
    assert ("fastserve_kv_blocks",) not in got  # nothing is said of what is not loaded
    assert server.get("/health/ready").status_code == 200
