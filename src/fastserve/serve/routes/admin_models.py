"""/admin/models: which models are loaded, and having them loaded and unloaded."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.serve.connection import run_while_connected
from fastserve.serve.model_entry import ModelEntry
from fastserve.serve.record import RequestRecord
from fastserve.serve.schema.admin_models import ModelName
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.service import Service
from fastserve.serve.snapshot import (
    ModelMemory,
    ModelSnapshot,
    describe_memory,
    describe_model,
    describe_models,
)
from fastserve.serve.stream import json_response


@dataclass(frozen=True, slots=True)
class ModelSnapshotList:
    """Models that a server knows."""

    models: Seq[ModelSnapshot]
    model_memory: ModelMemory


def admin_models_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/admin/models", tags=["admin"], responses=ERRORS)
    models = service.models

    @router.get("", response_model=ModelSnapshotList)
    async def list_models() -> Response:
        return json_response(asdict(ModelSnapshotList(describe_models(models), describe_memory(models))))

    @router.post("/load", response_model=ModelSnapshot)
    async def load(body: ModelName, request: Request) -> Response:
        """Have a model loaded, where it is not. It answers when it is."""
        entry = models.find(body.model)
        RequestRecord.of(request.scope).details["model"] = entry.name
        await run_while_connected(request.receive, models.memory.load(entry))
        return _answer(entry)

    @router.post("/unload", response_model=ModelSnapshot)
    async def unload(body: ModelName, request: Request) -> Response:
        """Have a model's memory given back. Requests that use it end first; it answers when they have. The
        next request that asks for it loads it again."""
        entry = models.find(body.model)
        RequestRecord.of(request.scope).details["model"] = entry.name
        await run_while_connected(request.receive, models.memory.unload(entry))
        return _answer(entry)

    def _answer(entry: ModelEntry) -> Response:
        return json_response(asdict(describe_model(models, entry)))

    return router
