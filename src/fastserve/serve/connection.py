"""What happens to a request's work when its client goes away: it ends too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

from starlette.types import Receive

from fastserve.errors import RequestError

T = TypeVar("T")

CLIENT_GONE = 499  # nginx's number for requests whose client went before there was an answer


class Work(Protocol):
    """What can be given up at any moment."""

    def close(self) -> None: ...


@asynccontextmanager
async def closing_with_client(receive: Receive, work: Work) -> AsyncIterator[None]:
    """Close the work within as soon as the client has gone. The request's body has been read."""

    async def watch() -> None:
        await _wait_for_end(receive)
        work.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work comes to; it is cancelled as soon as the client has gone.

    Raises:
        RequestError: the client has gone. Nobody will read of it.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_wait_for_end(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_gone()
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()


def client_gone() -> RequestError:
    return RequestError("the client has gone", status=CLIENT_GONE, code="client_gone")


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
