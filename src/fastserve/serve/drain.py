"""Draining: requests that run go on to their ends, and new ones are asked to come later, or elsewhere."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.errors import RequestError
from fastserve.serve.connection import transport_of
from fastserve.serve.errors import error_response

_ADMIN = "/admin/"
_CANCEL = "/cancel"  # of a response that runs in the background


class Connection(Protocol):
    """What the end of an answer may still lie in."""

    def get_write_buffer_size(self) -> int: ...
    def is_closing(self) -> bool: ...


class Drain:
    """Whether a server takes new requests, which may change at any time; and how many are under way: from
    when they are let in until their whole answer has gone to the system, in the background to their end."""

    def __init__(self) -> None:
        self.is_draining = False
        self._num_begun = 0  # and not ended
        self._unsent: WeakSet[Connection] = WeakSet()

    @property
    def num_under_way(self) -> int:
        """Requests for work."""
        self._unsent = WeakSet(connection for connection in self._unsent if _has_unsent(connection))
        return self._num_begun + len(self._unsent)

    def begin(self) -> None:
        """A request for work is under way from now on, until `end`."""
        self._num_begun += 1

    def end(self, connection: Connection | None = None) -> None:
        """It has ended, but for what its connection has not sent yet."""
        self._num_begun -= 1
        if connection is not None and _has_unsent(connection):
            self._unsent.add(connection)

    def check(self) -> None:
        """
        Raises:
            RequestError: new work has come while the server drains.
        """
        if self.is_draining:
            raise RequestError(
                "the server drains: it ends the requests that it has, and takes no more",
                status=503,
                code="draining",
                hint="try again later, or ask another server",
            )


class DrainGate:
    """Around the routes: counts the work that is under way, and refuses more while the server drains. What
    only looks, ends something, or comes from who looks after the server, is let through."""

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_work(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            self._drain.check()
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        self._drain.begin()
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.end(transport_of(scope))


def _is_work(method: str, path: str) -> bool:
    return method == "POST" and not path.startswith(_ADMIN) and not path.endswith(_CANCEL)


def _has_unsent(connection: Connection) -> bool:
    return not connection.is_closing() and connection.get_write_buffer_size() > 0
