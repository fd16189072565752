"""/v1/models: what is served."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from fastserve.engine.loaded_model import ModelPlan
from fastserve.errors import FastServeError
from fastserve.serve.model_entry import ModelEntry
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.models import ModelDocument, ModelList
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response


def models_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["models"], responses=ERRORS)
    models = service.models

    @router.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        """All names that a request may have, also of models that are loaded when they are asked for."""
        named = [*((entry.name, entry) for entry in models.entries), *models.further_names().items()]
        documents = [await _describe(name, entry) for name, entry in named]
        adapters = models.adapter_names().items()
        documents += [await _describe(name, entry, parent=parent) for name, (parent, entry) in adapters]
        return json_response({"object": "list", "data": [d for d in documents if d is not None]})

    @router.get("/v1/models/{model:path}", response_model=ModelDocument)
    async def get_model(model: str) -> Response:
        entry, adapter = models.find_with_adapter(model)
        plan = await _plan(entry)
        parent = None if adapter is None else model.rpartition(":")[0]
        return json_response(_document(model, entry, plan, parent))

    async def _describe(name: str, entry: ModelEntry, *, parent: str | None = None) -> dict[str, Any] | None:
        """None of a version that came while the server runs and cannot be read."""
        try:
            return _document(name, entry, await _plan(entry), parent)
        except FastServeError:
            return None

    def _document(name: str, entry: ModelEntry, plan: ModelPlan, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": models.created,
            "owned_by": "fastserve",
            "root": entry.name,
            "parent": parent,
            "task": plan.task,
            "context_length": plan.context_length,
        }

    return router


async def _plan(entry: ModelEntry) -> ModelPlan:
    if entry.plan is None:
        assert entry.opener is not None
        entry.plan = await asyncio.to_thread(entry.opener.plan)
    return entry.plan
