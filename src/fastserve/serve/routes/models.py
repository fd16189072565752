"""/v1/models: what is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from fastserve.serve.model_table import ServedModel
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.models import ModelDocument, ModelList
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response


def models_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["models"], responses=ERRORS)
    models = service.models

    @router.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        return json_response(
            {"object": "list", "data": [describe(model, models.created) for model in models]}
        )

    @router.get("/v1/models/{model:path}", response_model=ModelDocument)
    async def get_model(model: str) -> Response:
        return json_response(describe(models.find(model), models.created))

    return router


def describe(model: ServedModel, created: int) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "fastserve",
        "task": "generate" if model.model.is_decoder else "embed",
        "context_length": model.model.context_length,
    }
