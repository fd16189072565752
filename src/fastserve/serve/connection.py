"""What happens to a request's work when its client goes away: it ends too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol, Self, TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.errors import RequestError

T = TypeVar("T")

CLIENT_GONE = 499  # nginx's number for requests whose client went before there was an answer


_STATUS_LINE = b"HTTP/1.1 "  # what the head of an answer begins with, and a chunk of a stream does not
_TRANSPORT = "fastserve.transport"
_MOST_UNSENT_BYTES = 16 * 1024  # of a client that is not slow


class HeadMerger(asyncio.Transport):
    """A connection's transport that sends the head of an answer with what is written next, if that comes
    before the event loop goes on: one call of the system, and one wake of the client, instead of two.

    Args:
        transport: what everything goes to.
        loop: that it belongs to.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._head:
            self._transport.write(self._take_head() + data)
        elif bytes(data[: len(_STATUS_LINE)]) == _STATUS_LINE:
            self._head = bytes(data)
            self._loop.call_soon(self.flush)
        elif data:
            self._transport.write(data)

    def flush(self) -> None:
        """Send a head that nothing has followed."""
        if self._head:
            self._transport.write(self._take_head())

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def _take_head(self) -> bytes:
        head, self._head = self._head, b""
        return head


class DirectWriter:
    """Writes parts of a body that is under way straight to its connection, in the framing of HTTP/1.1.

    Through ASGI each part passes a dozen coroutines, and the task that awaits them must be woken: for every
    token of every stream.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    @classmethod
    def of(cls, scope: Scope) -> Self | None:
        """None where the server offers no transport, or the body is not sent in chunks of HTTP/1.1."""
        transport = transport_of(scope)
        is_chunked = scope["http_version"] == "1.1" and scope["method"] != "HEAD"
        return cls(transport) if transport is not None and is_chunked else None

    @staticmethod
    def offer(app: ASGIApp, transport: asyncio.Transport) -> ASGIApp:
        """The application, with a connection's transport in its scopes."""

        async def with_transport(scope: Scope, receive: Receive, send: Send) -> None:
            scope[_TRANSPORT] = transport
            await app(scope, receive, send)

        return with_transport

    @property
    def is_ready(self) -> bool:
        """Whether the client has taken about all that was written."""
        is_slow = self._transport.get_write_buffer_size() > _MOST_UNSENT_BYTES
        return not is_slow and not self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Not empty, after a first part went through ASGI, and before the last one."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def transport_of(scope: Scope) -> asyncio.Transport | None:
    """The transport of a request's connection; None where the server offers none."""
    transport: asyncio.Transport | None = scope.get(_TRANSPORT)
    return transport


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
