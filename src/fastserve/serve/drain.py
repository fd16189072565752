"""Draining: requests that run go on to their ends, and new ones are asked to come later, or elsewhere."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.errors import RequestError
from fastserve.serve.errors import error_response

_ADMIN = "/admin/"
_CANCEL = "/cancel"  # of a response that runs in the background


class Drain:
    """Whether a server takes new requests. It may change its mind at any time."""

    def __init__(self) -> None:
        self.is_draining = False

    def check(self, method: str, path: str) -> None:
        """What only looks, ends something, or comes from who looks after the server, is let through.

        Raises:
            RequestError: new work has come while the server drains.
        """
        is_work = method == "POST" and not path.startswith(_ADMIN) and not path.endswith(_CANCEL)
        if self.is_draining and is_work:
            raise RequestError(
                "the server drains: it ends the requests that it has, and takes no more",
                status=503,
                code="draining",
                hint="try again later, or ask another server",
            )


class DrainGate:
    """Around the routes: refuses new work while the server drains."""

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._drain.check(scope["method"], scope["path"])
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
