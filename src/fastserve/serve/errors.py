"""Errors as OpenAI's error object: one table from the tree of `fastserve.errors` to statuses and codes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from reprlib import Repr
from typing import Any

from starlette.responses import Response

from fastserve.errors import (
    ClosedError,
    ConstraintError,
    ContextLengthError,
    DeadlineError,
    FastServeError,
    MemoryLimitError,
    ModelMemoryError,
    ModelNotFoundError,
    OptionError,
    QueueFullError,
    RateLimitError,
    RequestError,
    StepError,
    TemplateError,
    UnsupportedError,
)

logger = logging.getLogger(__name__)

_MOST_SHOWN = 80  # characters of a value in a message
_SOURCES = ("body", "query")  # where a field is, for pydantic
_SHORT = Repr()  # of values that may be nested as deep as JSON is read
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 2 * _MOST_SHOWN


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an error is to a client."""

    status: int
    type: str
    code: str
    param: str | None = None


_VERDICTS: Mapping[type[FastServeError], Verdict] = {
    OptionError: Verdict(400, "invalid_request_error", "invalid_value"),
    ConstraintError: Verdict(400, "invalid_request_error", "invalid_constraint"),
    ContextLengthError: Verdict(400, "invalid_request_error", "context_length_exceeded", "prompt"),
    MemoryLimitError: Verdict(400, "invalid_request_error", "kv_memory_exceeded", "prompt"),
    ModelMemoryError: Verdict(507, "server_error", "model_does_not_fit", "model"),
    TemplateError: Verdict(400, "invalid_request_error", "template_error", "messages"),
    UnsupportedError: Verdict(400, "invalid_request_error", "unsupported_model", "model"),
    ModelNotFoundError: Verdict(404, "invalid_request_error", "model_not_found", "model"),
    QueueFullError: Verdict(429, "rate_limit_error", "queue_full"),
    RateLimitError: Verdict(429, "rate_limit_error", "rate_limit_exceeded"),
    DeadlineError: Verdict(408, "timeout_error", "deadline_exceeded", "timeout_ms"),
    ClosedError: Verdict(503, "server_error", "shutting_down"),
    StepError: Verdict(500, "server_error", "step_failed"),
}
_TYPES = {401: "authentication_error", 403: "permission_error"}


def judge(error: FastServeError) -> Verdict:
    """What an error is to a client.

    >>> judge(ContextLengthError("too long")).code
    'context_length_exceeded'
    """
    if isinstance(error, RequestError):
        type_ = "server_error" if error.status >= 500 else "invalid_request_error"
        return Verdict(error.status, _TYPES.get(error.status, type_), error.code, error.param)
    known = (_VERDICTS[class_] for class_ in type(error).__mro__ if class_ in _VERDICTS)
    verdict = next(known, Verdict(500, "server_error", "internal_error"))
    if isinstance(error, OptionError) and error.option is not None:
        return Verdict(verdict.status, verdict.type, verdict.code, error.option)
    return verdict


def error_object(error: FastServeError) -> dict[str, Any]:
    verdict = judge(error)
    return {"message": str(error), "type": verdict.type, "param": verdict.param, "code": verdict.code}


def error_document(error: FastServeError) -> bytes:
    """The error object, JSON in ASCII: messages may quote anything."""
    return json.dumps({"error": error_object(error)}).encode("ascii")


def error_response(error: FastServeError) -> Response:
    """The answer to a request that has failed."""
    headers = {}
    if isinstance(error, QueueFullError | RateLimitError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    status = judge(error).status
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 503:
        headers["Retry-After"] = "1"
    return Response(error_document(error), status, headers, media_type="application/json")


def nothing_at(path: str) -> RequestError:
    """The error of an address at which there is nothing."""
    return RequestError(f"there is nothing at {path[:100]}", status=404, code="not_found")


def defect_response(error: Exception) -> Response:
    """The answer where our own code has failed; what has failed is for the log."""
    logger.error("a request has failed by a defect", exc_info=error)
    message = f"the server has failed by a defect: {type(error).__name__}"
    return error_response(RequestError(message, status=500, code="internal_error"))


@contextmanager
def naming(
    names: Mapping[str, str] | None = None, *, prompt: str = "prompt", constraint: str | None = None
) -> Iterator[None]:
    """Have what is refused be named as the request names it.

    >>> with naming({"max_tokens": "max_output_tokens"}):
    ...     raise OptionError("max_tokens=0 is out of range", option="max_tokens")
    Traceback (most recent call last):
    fastserve.errors.RequestError: max_output_tokens=0 is out of range

    Args:
        names: fields by the options that they are called within, where they differ.
        prompt: the field that the prompt is made of.
        constraint: the field that says what the text must be.

    Raises:
        RequestError: with the verdict of what was raised within, and the field.
    """
    try:
        yield
    except FastServeError as error:
        verdict = judge(error)
        if verdict.status != 400:
            raise
        names = {"tenant": "user", **(names or {})}
        own = error.option if isinstance(error, OptionError) else None
        param = {"prompt": prompt, "messages": prompt, **names}.get(verdict.param or "", verdict.param)
        if isinstance(error, ConstraintError) and own is None:
            param = constraint
        message, hint = error.message, error.hint
        for ours, theirs in names.items():
            if ours == own:
                message = message.replace(ours, theirs, 1)
            elif "_" in ours:  # no word of a sentence
                message, hint = message.replace(ours, theirs), hint and hint.replace(ours, theirs)
        raise RequestError(message, status=400, code=verdict.code, param=param, hint=hint) from error


def validation_error(errors: Sequence[Mapping[str, Any]], body: Any) -> RequestError:
    """The first of what pydantic finds wrong with a body: unknown fields before all others, and of a field
    that may be one thing or another, what is wrong with the one that it is most like."""
    unknown = (e for e in errors if e["type"] == "extra_forbidden")
    error = next(unknown, None) or max(errors, key=lambda e: len(e["loc"]))
    if error["type"] in ("json_invalid", "json_type"):
        reason = error.get("ctx", {}).get("error", error["msg"])
        return RequestError(f"the body is not JSON: {reason}", status=400, code="invalid_json")
    location = [part for index, part in enumerate(error["loc"]) if index or part not in _SOURCES]
    param = _to_path(location, body, is_missing=error["type"] == "missing") or None
    if error["type"] == "extra_forbidden":
        return RequestError(
            f"{param} is not supported",
            status=400,
            code="unsupported_parameter",
            param=param,
            hint="leave it out",
        )
    if error["type"] == "missing" and param is None:
        return RequestError(
            "the request has no body", status=400, code="missing_body", hint="send a JSON object"
        )
    if error["type"] == "missing":
        return RequestError(f"{param} is missing", status=400, code="missing_parameter", param=param)
    shown = _SHORT.repr(error.get("input"))
    shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
    message = str(error["msg"])
    return RequestError(
        f"{param or 'the body'}={shown}: {message[:1].lower()}{message[1:]}",
        status=400,
        code="invalid_value",
        param=param,
    )


def _to_path(location: Sequence[object], body: Any, *, is_missing: bool) -> str:
    """`messages[0].role`: what there is in the body, without the names by which pydantic tells alternatives
    apart, and what is missing there.

    >>> _to_path(["messages", 0, "Message", "role"], {"messages": [{}]}, is_missing=True)
    'messages[0].role'
    """
    path, value = "", body
    for place, part in enumerate(location, 1):
        if isinstance(part, int) and isinstance(value, list):
            path, value = f"{path}[{part}]", value[part]
            continue
        is_there = isinstance(value, dict) and part in value
        if is_there or (is_missing and place == len(location)) or not isinstance(body, dict):
            path = f"{path}.{part}" if path else str(part)
            value = value[part] if is_there else None
    return path
