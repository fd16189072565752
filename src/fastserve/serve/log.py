"""Names requests and writes one line of JSON for each, without prompts and completions unless asked."""

from __future__ import annotations

import json
import logging
import secrets
import time
from functools import partial
from typing import TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.serve.connection import CLIENT_GONE
from fastserve.serve.errors import defect_response
from fastserve.serve.metrics import Metrics
from fastserve.serve.record import RequestRecord
from fastserve.serve.tracing import RequestSpan, Tracing

REQUEST_ID = b"x-request-id"
_MOST_ID_CHARACTERS = 128
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))  # clients may make up more

logger = logging.getLogger("fastserve.serve.request")


class RequestLog:
    """Around all else: gives every request a record and a name, its own `x-request-id` or a new one, answers
    with that name, also where our own code has failed, and writes a line when it has ended: one that goes on
    in the background, with its end. A span, where they are asked for, is as long.

    Args:
        tracing: makes spans; None: there are none.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope))
        record.attach(scope)
        header = (REQUEST_ID, record.request_id.encode("ascii"))

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], header]
            await send(message)

        span = None if self._tracing is None else self._tracing.begin(scope, record)
        record.write = partial(_end, scope, record, span)
        self._metrics.http_in_flight.inc()
        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            if record.status is not None:
                record.status = 500  # what has been sent is less than an answer
                raise
            await defect_response(error)(scope, receive, send_named)
        finally:
            self._metrics.http_in_flight.dec()
            self._count(scope, record)
            if not record.goes_on:
                record.write()

    def _count(self, scope: Scope, record: RequestRecord) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_requests.labels(method, route, str(_status_of(record))).inc()


def _status_of(record: RequestRecord) -> int:
    return CLIENT_GONE if record.status is None else record.status


def _end(scope: Scope, record: RequestRecord, span: RequestSpan | None) -> None:
    """A request has ended: end its span, and write its line."""
    fields = {
        "request_id": record.request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": _status_of(record),
        "seconds": round(time.perf_counter() - record.arrival_seconds, 6),
        "client": (scope.get("client") or (None,))[0],
        **record.details,
        **({} if span is None else {"trace_id": span.trace_id}),
    }
    if span is not None:
        span.end(scope, record, status=_status_of(record))
    logger.info("request", extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
    is_printable = given.isascii() and given.decode("latin-1").isprintable()
    if is_printable and 0 < len(given) <= _MOST_ID_CHARACTERS:
        return str(given.decode("ascii"))
    return f"req-{secrets.token_hex(12)}"


class JsonFormatter(logging.Formatter):
    """Records as JSON objects, one a line, in ASCII: what clients send cannot break lines."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


def log_to(stream: TextIO, *, level: int = logging.INFO) -> None:
    """Write what FastServe, uvicorn and OpenTelemetry log to a stream, one JSON object a line."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    foreign_level = max(level, logging.WARNING)
    for name, own_level in (
        ("fastserve", level),
        ("uvicorn", foreign_level),
        ("opentelemetry", foreign_level),
    ):
        named = logging.getLogger(name)
        named.handlers = [handler]
        named.setLevel(own_level)
        named.propagate = False
