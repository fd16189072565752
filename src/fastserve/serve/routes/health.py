"""/health/live, /health/ready and /metrics: for those who look after the process."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.health import HealthDocument
from fastserve.serve.security import account_of, is_admin
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response
from fastserve.serve.usage import TenantMetrics

_RED: dict[int | str, dict[str, Any]] = {503: {"model": HealthDocument}}


def health_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["health"])
    limit = service.options.ready_seconds

    @router.get("/health/live", response_model=HealthDocument, responses=_RED)
    async def live() -> Response:
        """Whether the process works: 503 where an engine's thread has ended, which only a new start mends."""
        dead = {model.name: "its thread has ended" for model in service.models if not model.is_alive}
        return _answer(dead)

    @router.get("/health/ready", response_model=HealthDocument, responses=_RED)
    async def ready() -> Response:
        """Whether requests are taken, and make progress: 503 while the server drains, and where an engine has
        ended no step for too long."""
        late = {
            model.name: f"no step has ended for {seconds:.1f} seconds; ready_seconds is {limit:g}"
            for model in service.models
            if (seconds := model.seconds_without_step) > limit or not model.is_alive
        }
        if service.drain.is_draining:
            late["server"] = "it drains, and takes no requests"
        return _answer(late)

    @router.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
    async def metrics(request: Request) -> Response:
        """In Prometheus' text format. A tenant sees itself alone of all, the admin key sees all of them."""
        await service.engine_metrics.refresh()
        tenants = service.tenants if is_admin(request.scope) else (account_of(request.scope),)
        text = generate_latest(service.metrics.registry)
        text += generate_latest(TenantMetrics(tenants, has_energy=service.energy.is_known))
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return router


def _answer(reasons: dict[str, str]) -> Response:
    response = json_response({"status": "fail" if reasons else "ok", "reasons": reasons})
    response.status_code = 503 if reasons else 200
    return response
