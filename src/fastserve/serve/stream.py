"""Answers to requests that generate text: whole, or as server-sent events while they come.

What is written of a request is its format's; how it is written is here: errors, comments that keep a silent
connection, a client that has gone or takes nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastserve.engine.completion import Chunk, Completion
from fastserve.errors import FastServeError
from fastserve.serve.connection import DirectWriter, client_gone, closing_with_client
from fastserve.serve.errors import error_document, error_response
from fastserve.serve.generation import Generation
from fastserve.serve.options import ServeOptions

KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]

to_json_text = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class EventFormat(Protocol):
    """How one API writes completions as they come."""

    def begin(self, generation: Generation) -> bytes:
        """Events before the first chunk."""
        ...

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        """Events of a chunk of the completion `index`; may be empty."""
        ...

    def end(self, generation: Generation) -> bytes:
        """Events after the last chunk."""
        ...

    def error(self, error: FastServeError) -> bytes:
        """Events that end a stream that cannot go on, which nobody may read any more."""
        ...


class Format(EventFormat, Protocol):
    """How one API writes completions, whole or as they come."""

    def document(self, completions: Seq[Completion], generation: Generation) -> Mapping[str, Any]:
        """The whole answer of a request that is not streamed."""
        ...


def event(data: str, name: str | None = None) -> bytes:
    """A server-sent event. `data` has no line breaks.

    >>> event("{}", "done")
    b'event: done\\ndata: {}\\n\\n'
    """
    return (f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n").encode()


def error_event(error: FastServeError) -> bytes:
    """The event of an error after which nothing follows."""
    return b"data: " + error_document(error) + b"\n\n"


def json_response(document: Mapping[str, Any]) -> Response:
    return Response(to_json_text(document).encode(), media_type="application/json")


async def answer(
    context: AbstractAsyncContextManager[Generation],
    format_: Format,
    request: Request,
    options: ServeOptions,
    *,
    is_streamed: bool,
) -> Response:
    """The answer to a request whose generation is entered here, so that what is refused is refused by its
    status, streamed or not.

    Raises as `generate`.
    """
    if is_streamed:
        return await stream(context, format_, options)
    async with context as generation, closing_with_client(request.receive, generation):
        completions = await generation.read_all()
        if len(completions) < generation.num_completions:
            raise client_gone()
        return json_response(format_.document(completions, generation))


async def stream(
    context: AbstractAsyncContextManager[Generation], format_: EventFormat, options: ServeOptions
) -> Response:
    """The answer in events. As `answer`."""
    stack = AsyncExitStack()
    generation = await stack.enter_async_context(context)
    return EventStream(generation, stack, format_, options)


class EventStream(Response):
    """Writes a generation as it comes, one write for all that a step has brought.

    Nothing is sent before the first chunk, or the first comment: what fails until then has its status.
    """

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, stack: AsyncExitStack, format_: EventFormat, options: ServeOptions
    ) -> None:
        self._generation = generation
        self._stack = stack
        self._format = format_
        self._options = options
        self._has_begun = False
        self._has_status = False
        self._last_write_seconds = 0.0
        self._is_writing = False
        self._has_stalled = False
        self._is_settled = False  # its format knows of its end
        self._timer: asyncio.TimerHandle | None = None
        self._writer: DirectWriter | None = None
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._last_write_seconds = asyncio.get_running_loop().time()
        self._look(task)
        self._writer = DirectWriter.of(scope)
        if self._writer is not None:
            self._generation.has_news.listener = self._write_at_once
        try:
            async with self._stack, closing_with_client(receive, self._generation):
                await self._write_all(scope, receive, send)
        except asyncio.CancelledError:
            if not self._has_stalled:
                raise
        finally:
            if not self._is_settled:
                self._format.error(client_gone())
            self._generation.has_news.listener = None
            if self._timer is not None:
                self._timer.cancel()

    def _write_at_once(self) -> bool:
        """Write what a step has brought as it comes, without waking the task of this stream: that begins it,
        ends it, and waits where its client is slow."""
        assert self._writer is not None
        if not self._has_begun or self._is_writing or not self._writer.is_ready:
            return False
        chunks = self._generation.take()
        if not chunks:  # none: it is over, or was nudged
            return False
        data = b"".join([self._format.chunk(*chunk) for chunk in chunks])
        if data:
            self._writer.write(data)
            self._last_write_seconds = asyncio.get_running_loop().time()
        return True

    def _look(self, task: asyncio.Task[Any]) -> None:
        """Now and then: whether the connection has been silent for too long, by us or by its client."""
        loop, options = asyncio.get_running_loop(), self._options
        silent_seconds = loop.time() - self._last_write_seconds
        if not self._is_writing and silent_seconds >= options.keep_alive_seconds:
            self._generation.nudge()
        elif self._is_writing and silent_seconds >= options.write_seconds:
            self._has_stalled = True
            task.cancel()
            return
        patience = min(options.keep_alive_seconds, options.write_seconds) / 4
        self._timer = loop.call_later(patience, self._look, task)

    async def _write_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation, to_events = self._generation, self._format.chunk
        try:
            while not generation.has_ended:
                chunks = await generation.read()
                if chunks:
                    start = self._begin()
                    await self._write(send, start + b"".join([to_events(*chunk) for chunk in chunks]))
                elif not generation.has_ended:
                    await self._write(send, self._begin() + KEEP_ALIVE)
            last = self._begin() + self._format.end(generation)
            self._is_settled = True
            await self._write(send, last, is_last=True)
        except FastServeError as error:
            self._is_settled = True
            last = self._format.error(error)
            if not self._has_status:
                await error_response(error)(scope, receive, send)
            else:
                await self._write(send, last, is_last=True)

    def _begin(self) -> bytes:
        """The events before all others, once: formats may number their events."""
        if self._has_begun:
            return b""
        self._has_begun = True
        return self._format.begin(self._generation)

    async def _write(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        if not data and not is_last:
            return
        self._is_writing = True
        if not self._has_status:
            self._has_status = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})
        self._is_writing = False
        self._last_write_seconds = asyncio.get_running_loop().time()
