"""Bounds of a request's body: how large it is, and how long it may take to come."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.errors import RequestError
from fastserve.serve.errors import error_response
from fastserve.serve.options import ServeOptions

# What may be no text, or no finite number, once it is parsed: schemas of tools may have it anywhere.
_DOUBTFUL = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]|[eE]\+?\d{3}|\d{200}")
_MOST_DEPTH = 100  # of objects and arrays within each other; Python's own readers and writers end at some 900


def check_text(body: bytes) -> None:
    """
    Raises:
        RequestError: what is not UTF-8, and JSON that could not be written again: nested too deeply, with
            half a surrogate pair, or a number that is not finite.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body is not UTF-8 from byte {error.start} on",
            status=400,
            code="invalid_json",
            hint="send JSON in UTF-8",
        ) from error
    may_be_deep = body.count(b"[") + body.count(b"{") > _MOST_DEPTH
    is_doubtful = _DOUBTFUL.search(body) is not None
    if not may_be_deep and not is_doubtful:
        return
    try:
        document = json.loads(body)
        is_deep = isinstance(document, dict | list) and is_nested_deeper(document, _MOST_DEPTH)
    except ValueError:
        return  # for the route to say
    except RecursionError:
        is_deep = True
    if is_deep:
        raise RequestError(
            f"the body is nested too deeply: the most is {_MOST_DEPTH}", status=400, code="invalid_json"
        )
    if not is_doubtful:
        return
    try:
        check_writable(document)
    except ValueError as error:  # UnicodeEncodeError is one
        place = _find_unwritable(document)
        is_text = isinstance(error, UnicodeEncodeError)
        reason = "has half a surrogate pair, which is no character" if is_text else "is not finite"
        raise RequestError(
            f"{place or 'the body'} {reason}",
            status=400,
            code="invalid_json",
            param=place or None,
            hint="send whole characters" if is_text else "send a finite number",
        ) from error


def check_writable(value: Any) -> None:
    """Raises ValueError for what is no text or no finite number, and therefore no JSON."""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def is_nested_deeper(document: dict[str, Any] | list[Any], limit: int) -> bool:
    """Whether more objects and arrays than the limit are within each other.

    >>> is_nested_deeper([{"a": []}], 2)
    True
    """
    level = [document]
    for _ in range(limit):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _find_unwritable(document: Any) -> str:
    """Where the first text is that is none, or number that is not finite.

    >>> _find_unwritable({"a": [1.0, {"b": float("inf")}]})
    'a[1].b'
    """
    waiting = [("", document)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            if any(map(_is_unwritable, value)):
                return place
            inner = [(f"{place}.{key}" if place else key, item) for key, item in value.items()]
        elif isinstance(value, list):
            inner = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
        elif _is_unwritable(value):
            return place
        else:
            continue
        waiting += reversed(inner)
    return ""


def _is_unwritable(value: object) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    return isinstance(value, float) and not math.isfinite(value)


class BodyLimit:
    """Around the routes: takes the whole body in before they run, within the options' bounds."""

    def __init__(self, app: ASGIApp, *, options: ServeOptions) -> None:
        self._app = app
        self._max_bytes = options.max_body_bytes
        self._seconds = options.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            self._check_length(scope)
            async with asyncio.timeout(self._seconds):
                body = await self._read(receive)
        except TimeoutError:
            error = RequestError(
                f"the body has not come within {self._seconds:g} seconds", status=408, code="body_timeout"
            )
            await error_response(error)(scope, receive, send)
            return
        except RequestError as refusal:
            await error_response(refusal)(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        try:
            check_text(body)
        except RequestError as refusal:
            await error_response(refusal)(scope, receive, send)
            return
        rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_rest() -> Message:
            return rest.pop() if rest else await receive()

        await self._app(scope, receive_rest, send)

    async def _read(self, receive: Receive) -> bytes | None:
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes > self._max_bytes:
                raise self._too_large(f"more than {self._max_bytes}")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check_length(self, scope: Scope) -> None:
        """Refuse by what the client says, before anything is read."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                raise self._too_large(value.decode())

    def _too_large(self, num_bytes: str) -> RequestError:
        return RequestError(
            f"the body has {num_bytes} bytes; max_body is {self._max_bytes}",
            status=413,
            code="body_too_large",
            hint="send less at once, or start the server with a larger --max-body",
        )
