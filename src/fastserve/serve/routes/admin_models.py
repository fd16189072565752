"""/admin/models: which models are loaded, and having them loaded and unloaded."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.serve.connection import run_while_connected
from fastserve.serve.model_entry import ModelEntry
from fastserve.serve.schema.admin_models import ModelName, ModelStatus, ModelStatusList
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response


def admin_models_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/admin/models", tags=["admin"], responses=ERRORS)
    models = service.models

    @router.get("", response_model=ModelStatusList)
    async def list_models() -> Response:
        return json_response(models.snapshot())

    @router.post("/load", response_model=ModelStatus)
    async def load(body: ModelName, request: Request) -> Response:
        """Have a model loaded, where it is not. It answers when it is."""
        entry = models.find(body.model)
        await run_while_connected(request.receive, models.memory.load(entry))
        return _answer(entry)

    @router.post("/unload", response_model=ModelStatus)
    async def unload(body: ModelName, request: Request) -> Response:
        """Have a model's memory given back. Requests that use it end first; it answers when they have. The
        next request that asks for it loads it again."""
        entry = models.find(body.model)
        await run_while_connected(request.receive, models.memory.unload(entry))
        return _answer(entry)

    def _answer(entry: ModelEntry) -> Response:
        return json_response(models.describe(entry))

    return router
