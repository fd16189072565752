"""/v1/classify, /v1/token-classify and /v1/relations: classes of texts, of pairs, of words, of relations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.engine.task.classification import Span, prepare_relation, prepare_text
from fastserve.engine.task.token_classification import prepare_tags
from fastserve.errors import OptionError
from fastserve.models.task import Task
from fastserve.option import check_integer
from fastserve.serve.prediction import Asked, predict
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.classify import (
    ClassifyDocument,
    ClassifyRequest,
    RelationsRequest,
    TokenClassifyDocument,
    TokenClassifyRequest,
)
from fastserve.serve.schema.text_input import name_texts
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response


def classify_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["classify"], responses=ERRORS)

    @router.post("/v1/classify", response_model=ClassifyDocument)
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        pairs = _pairs(body)

        def ask(encoder: AsyncEncoder) -> list[Asked[Any]]:
            model, truncate = encoder.model, bool(body.truncate)
            if body.text_pair is None and model.task == "pair-classification":
                raise OptionError(
                    "the model classifies pairs of texts", hint="send text_pair too", option="text_pair"
                )
            return [
                Asked(
                    place=place,
                    prompts=[text for text in (first, second) if text is not None],
                    prepare=partial(prepare_text, model, first, second, truncate=truncate),
                )
                for place, first, second in pairs
            ]

        return await _answer("text-classification", "classification", body, ask, request)

    @router.post("/v1/token-classify", response_model=TokenClassifyDocument)
    async def token_classify(body: TokenClassifyRequest, request: Request) -> Response:
        if (body.input is None) == (body.tokens is None):
            raise OptionError("a text is given by input or by tokens", hint="send one", option="input")
        if body.stride is not None:
            check_integer("stride", body.stride, low=0)
        texts: list[tuple[str, Any]]
        if body.input is not None:
            texts = list(name_texts("input", body.input))
        else:
            texts = _name_words(cast("list[str] | list[list[str]]", body.tokens))

        def ask(encoder: AsyncEncoder) -> list[Asked[Any]]:
            return [
                Asked(
                    place=place,
                    prompts=[text],
                    prepare=partial(prepare_tags, encoder.model, text, stride=body.stride),
                )
                for place, text in texts
            ]

        return await _answer("token-classification", "token_classification", body, ask, request)

    @router.post("/v1/relations", response_model=ClassifyDocument)
    async def relations(body: RelationsRequest, request: Request) -> Response:
        given = body.input if isinstance(body.input, list) else [body.input]

        def ask(encoder: AsyncEncoder) -> list[Asked[Any]]:
            return [
                Asked(
                    place=f"input[{index}]" if isinstance(body.input, list) else "input",
                    prompts=[one.text],
                    prepare=partial(
                        prepare_relation,
                        encoder.model,
                        one.text,
                        Span(start=one.head.start, end=one.head.end),
                        Span(start=one.tail.start, end=one.tail.end),
                        truncate=bool(body.truncate),
                    ),
                )
                for index, one in enumerate(given)
            ]

        return await _answer("relation-extraction", "classification", body, ask, request)

    async def _answer(
        task: Task,
        name: str,
        body: ClassifyRequest | TokenClassifyRequest | RelationsRequest,
        ask: Any,
        request: Request,
    ) -> Response:
        async with service.encoder(body.model, request, task) as encoder:
            predicted = await predict(
                encoder,
                ask(encoder),
                request,
                options=service.options,
                metrics=service.metrics,
                tenant=tenant_of(request.scope, body.user),
            )
        return json_response(list_document(body.model, name, predicted.predictions, predicted.usage))

    return router


def list_document(
    model: str, name: str, predictions: Iterable[Mapping[str, Any]], usage: Mapping[str, int]
) -> dict[str, Any]:
    """The answer of a route for a classic task: an object of that name for each prediction."""
    data = [{"object": name, "index": index, **one} for index, one in enumerate(predictions)]
    return {"object": "list", "model": model, "data": data, "usage": usage}


def _pairs(body: ClassifyRequest) -> list[tuple[str, str, str | None]]:
    """Place, first and second text of each."""
    firsts = [(place, cast(str, text)) for place, text in name_texts("input", body.input)]
    if body.text_pair is None:
        return [(place, text, None) for place, text in firsts]
    seconds = [body.text_pair] if isinstance(body.text_pair, str) else body.text_pair
    if len(seconds) != len(firsts):
        raise OptionError(
            f"text_pair has {len(seconds)} texts for {len(firsts)} of input",
            hint="send one for each",
            option="text_pair",
        )
    return [(place, first, second) for (place, first), second in zip(firsts, seconds, strict=True)]


def _name_words(tokens: list[str] | list[list[str]]) -> list[tuple[str, Seq[str]]]:
    if isinstance(tokens[0], str):
        return [("tokens", tokens)]
    return [(f"tokens[{index}]", words) for index, words in enumerate(tokens)]
