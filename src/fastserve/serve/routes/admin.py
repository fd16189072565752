"""/admin/status, events, policies, policy and drain: to watch a server, and to steer it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.loaded_model import check_task
from fastserve.engine.policy import PolicyDescription, describe_policies, parse_policy
from fastserve.errors import ClosedError, OptionError, RequestError
from fastserve.serve.model_entry import ModelEntry
from fastserve.serve.record import RequestRecord
from fastserve.serve.schema.admin import DrainDocument, DrainRequest, PolicyDocument, PolicyRequest
from fastserve.serve.schema.body import ERRORS, STREAMED
from fastserve.serve.service import Service
from fastserve.serve.snapshot import ServerSnapshot
from fastserve.serve.stream import json_response

Interval = Annotated[float, Query(ge=0.1, le=60.0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class PolicyList:
    """Policies that a server knows."""

    policies: Seq[PolicyDescription]


def admin_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/admin", tags=["admin"], responses=ERRORS)
    snapshots, drain = service.snapshots, service.drain

    @router.get("/status", response_model=ServerSnapshot)
    async def get_status() -> Response:
        """The server now: models, memory, tenants, and the queues of each engine."""
        return Response(await snapshots.text(), media_type="application/json")

    @router.get("/events", response_class=StreamingResponse, responses=STREAMED)
    async def get_events(interval_seconds: Interval = 0.5) -> Response:
        """The same again and again, as events, until the client or the server ends, or another admin key
        takes the place of the one that was sent."""
        texts = snapshots.watch(interval_seconds)

        async def events() -> AsyncIterator[bytes]:
            async for text in texts:
                yield b"data: " + text + b"\n\n"

        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(events(), headers=headers, media_type="text/event-stream")

    @router.get("/policies", response_model=PolicyList)
    async def list_policies() -> Response:
        """Scheduling policies with their knobs: bounds, and defaults."""
        return json_response(asdict(PolicyList(describe_policies())))

    @router.post("/policy", response_model=PolicyDocument)
    async def set_policy(body: PolicyRequest, request: Request) -> Response:
        """Have a model, or all of them, go on by another scheduling policy, also when they are loaded later.
        Nothing that runs is lost."""
        RequestRecord.of(request.scope).details |= {"policy": body.policy, "model": body.model}
        entries = service.models.entries if body.model is None else [_find(service, body.model)]
        entries = [entry for entry in entries if entry.plan is None or entry.plan.task == "generate"]
        try:
            parse_policy(body.policy)
            await _set_policy(entries, body.policy)
        except OptionError as error:
            raise RequestError(
                error.message, status=400, code="invalid_value", param="policy", hint=error.hint
            ) from error
        return json_response({"policy": body.policy, "models": [entry.name for entry in entries]})

    @router.post("/drain", response_model=DrainDocument)
    async def set_drain(request: Request, body: DrainRequest | None = None) -> Response:
        """Take no new requests, and end those that run; or, with `is_draining` false, take some again."""
        drain.is_draining = body is None or body.is_draining
        RequestRecord.of(request.scope).details["is_draining"] = drain.is_draining
        return json_response({"is_draining": drain.is_draining, "num_requests": service.num_under_way})

    return router


def _find(service: Service, name: str) -> ModelEntry:
    """Raises ModelNotFoundError, UnsupportedError: there is none of that name, or it is an encoder."""
    entry = service.models.find(name)
    if entry.plan is not None:
        check_task("generate", entry.plan.settings, name)
    return entry


async def _set_policy(entries: Seq[ModelEntry], policy: str) -> None:
    """Also of what is loaded later. Raises OptionError where engines refuse it: then all do."""
    before = [entry.policy for entry in entries]
    for entry in entries:
        entry.policy = policy
    engines = [entry.model for entry in entries if isinstance(entry.model, AsyncLLM)]
    answers = await asyncio.gather(*(llm.set_policy(policy) for llm in engines), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, OptionError):
            for entry, old in zip(entries, before, strict=True):
                entry.policy = old
        if isinstance(answer, BaseException) and not isinstance(answer, ClosedError):  # or unloaded meanwhile
            raise answer
