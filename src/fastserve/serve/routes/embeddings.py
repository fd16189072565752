"""/v1/embeddings: vectors of texts."""

from __future__ import annotations

import base64

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.serve.embedding import embed, shorten
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.embedding import EmbeddingDocument, EmbeddingRequest
from fastserve.serve.schema.text_input import name_texts
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response


def embeddings_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["embed"], responses=ERRORS)

    @router.post("/v1/embeddings", response_model=EmbeddingDocument)
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        async with service.encoder(body.model, request) as encoder:
            embedded = await embed(
                encoder,
                name_texts("input", body.input),
                request,
                options=service.options,
                metrics=service.metrics,
                tenant=tenant_of(request.scope, body.user),
                truncate=bool(body.truncate),
            )
        vectors = shorten(embedded.vectors, body.dimensions)
        if body.encoding_format == "base64":
            rows: list[object] = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
        else:
            rows = vectors.tolist()
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        return json_response({"object": "list", "model": body.model, "data": data, "usage": embedded.usage})

    return router
