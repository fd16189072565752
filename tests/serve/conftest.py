"""A server over a tiny real model, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from fastserve.config import EngineOptions
from fastserve.engine.async_llm import AsyncLLM
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.app import create_app
from fastserve.serve.key_file import digest_of
from fastserve.serve.options import ServeOptions

T = TypeVar("T")

STORIES = "stories"
ADMIN_KEY = "fs-of-the-admin"
OPTIONS = EngineOptions(threads=1, context_length=256, kv_memory="1MiB")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Server:
    """An application and what calls it, on an event loop of its own."""

    def __init__(
        self, model: Path, options: ServeOptions, engine: EngineOptions, keys: ApiKeys | None
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.llm = AsyncLLM(model, engine, name=STORIES)
        headers = {}
        if keys is None:  # whoever may be an admin here is one
            has_admin = options.admin_key_file is not None
            keys = ApiKeys({}, admin_digest=digest_of(ADMIN_KEY) if has_admin else None)
            headers = {"x-api-key": ADMIN_KEY} if has_admin else {}
        self.app = create_app([self.llm], options, keys=keys)
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=headers, timeout=60
        )

    def run(self, awaitable: Awaitable[T]) -> T:
        async def main() -> T:
            return await awaitable

        return self.loop.run_until_complete(asyncio.wait_for(main(), 60))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.run(self.client.get(path, **options))

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.run(self.client.post(path, json=body, **options))

    def close(self) -> None:
        if self.llm.is_alive:
            status = self.run(self.llm.status())
            assert status.num_free_blocks == status.num_blocks
        self.run(self.client.aclose())
        self.run(self.llm.close())
        self.loop.close()


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A real Llama of 260k parameters with a context of 512 that writes small stories."""
    return shared_data / "model_stories260K"


@pytest.fixture(scope="session")
def stories_for_chat(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template; named as it is served."""
    folder = tmp_path_factory.mktemp("models") / STORIES
    folder.mkdir()
    for file in stories.iterdir():
        if file.suffix != ".gguf":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def make_server(stories_for_chat: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(
        options: ServeOptions | None = None, engine: EngineOptions = OPTIONS, keys: ApiKeys | None = None
    ) -> Server:
        servers.append(Server(stories_for_chat, options or ServeOptions(), engine, keys))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(make_server: Callable[..., Server]) -> Server:
    """With the options' defaults."""
    return make_server()


def events(response: httpx.Response) -> list[str]:
    """The data of a stream's events; comments left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    return [line.removeprefix("data: ") for line in lines if not line.startswith(":")]
