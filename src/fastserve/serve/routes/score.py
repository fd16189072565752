"""/v1/score and /v1/rerank: how much texts have in common, by the cosine of their embeddings."""

from __future__ import annotations

import secrets

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.errors import OptionError
from fastserve.option import check_integer
from fastserve.serve.embedding import embed, normalize
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.score import RerankDocument, RerankRequest, ScoreDocument, ScoreRequest
from fastserve.serve.schema.text_input import name_texts
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response


def score_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["embed"], responses=ERRORS)

    @router.post("/v1/score", response_model=ScoreDocument)
    async def score(body: ScoreRequest, request: Request) -> Response:
        first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
        second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        if len(first) not in (1, len(second)):
            raise OptionError(
                f"text_1 has {len(first)} texts for {len(second)} of text_2",
                hint="send one, or one for each",
                option="text_1",
            )
        async with service.encoder(body.model, request) as encoder:
            embedded = await embed(
                encoder,
                [*name_texts("text_1", body.text_1), *name_texts("text_2", body.text_2)],
                request,
                options=service.options,
                metrics=service.metrics,
                tenant=tenant_of(request.scope, body.user),
                truncate=bool(body.truncate),
            )
        vectors = normalize(embedded.vectors)
        scores = np.sum(vectors[: len(first)] * vectors[len(first) :], axis=1).tolist()
        data = [{"object": "score", "index": i, "score": value} for i, value in enumerate(scores)]
        return json_response({"object": "list", "model": body.model, "data": data, "usage": embedded.usage})

    @router.post("/v1/rerank", response_model=RerankDocument)
    async def rerank(body: RerankRequest, request: Request) -> Response:
        if body.top_n is not None:
            check_integer("top_n", body.top_n, low=1)
        async with service.encoder(body.model, request) as encoder:
            embedded = await embed(
                encoder,
                [("query", body.query), *name_texts("documents", body.documents)],
                request,
                options=service.options,
                metrics=service.metrics,
                tenant=tenant_of(request.scope, body.user),
                truncate=bool(body.truncate),
            )
        vectors = normalize(embedded.vectors)
        scores = vectors[1:] @ vectors[0]
        best = np.argsort(-scores, kind="stable")[: body.top_n].tolist()
        results = [{"index": index, "relevance_score": float(scores[index])} for index in best]
        if body.return_documents is not False:
            results = [
                {**result, "document": {"text": body.documents[result["index"]]}} for result in results
            ]
        return json_response(
            {
                "id": f"rerank-{secrets.token_hex(12)}",
                "model": body.model,
                "results": results,
                "usage": embedded.usage,
            }
        )

    return router
