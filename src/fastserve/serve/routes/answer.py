"""/v1/answer: answers to questions, passages of a text or one of several choices."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.loaded_model import LoadedModel
from fastserve.engine.task.answer import MAX_ANSWER_TOKENS, prepare_answer, prepare_choice
from fastserve.errors import OptionError
from fastserve.models.task import Task
from fastserve.option import check_integer
from fastserve.serve.prediction import Asked, predict
from fastserve.serve.routes.classify import list_document
from fastserve.serve.schema.answer import AnswerDocument, AnswerRequest
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.text_input import name_texts
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import json_response

# Fields that mean nothing beside the one that is given.
_OF_CONTEXT = ("can_be_unanswerable", "max_answer_tokens", "stride")
_OF_CHOICES = ("truncate",)


def answer_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["answer"], responses=ERRORS)

    @router.post("/v1/answer", response_model=AnswerDocument)
    async def answer(body: AnswerRequest, request: Request) -> Response:
        _check(body)
        questions = [(place, cast(str, text)) for place, text in name_texts("question", body.question)]
        is_choice = body.choices is not None
        make = _choose if is_choice else _find
        texts = _for_each(body, len(questions))
        task: Task = "multiple-choice" if is_choice else "question-answering"
        async with service.encoder(body.model, request, task) as encoder:
            predicted = await predict(
                encoder,
                [
                    make(encoder.model, body, *asked, text)
                    for asked, text in zip(questions, texts, strict=True)
                ],
                request,
                options=service.options,
                metrics=service.metrics,
                tenant=tenant_of(request.scope, body.user),
            )
        predictions = [_as_answer(one) for one in predicted.predictions]
        return json_response(list_document(body.model, "answer", predictions, predicted.usage))

    return router


def _find(model: LoadedModel, body: AnswerRequest, place: str, question: str, context: Any) -> Asked[Any]:
    return Asked(
        place=place.replace("question", "context") if isinstance(body.context, list) else "context",
        prompts=[question, context],
        prepare=partial(
            prepare_answer,
            model,
            question,
            context,
            can_be_unanswerable=body.can_be_unanswerable is not False,
            max_answer_tokens=body.max_answer_tokens or MAX_ANSWER_TOKENS,
            stride=body.stride,
        ),
    )


def _choose(model: LoadedModel, body: AnswerRequest, place: str, question: str, choices: Any) -> Asked[Any]:
    return Asked(
        place=place,
        prompts=[question, *choices],
        prepare=partial(prepare_choice, model, question, choices, truncate=bool(body.truncate)),
    )


def _as_answer(prediction: dict[str, Any]) -> dict[str, Any]:
    """A choice has its text as the answer."""
    return {("answer" if key == "text" else key): value for key, value in prediction.items()}


def _check(body: AnswerRequest) -> None:
    """
    Raises:
        OptionError: not one of context and choices, or a field that means nothing beside it.
    """
    if (body.context is None) == (body.choices is None):
        raise OptionError("an answer is in a context or one of choices", hint="send one", option="context")
    without_use = _OF_CONTEXT if body.choices is not None else _OF_CHOICES
    for name in without_use:
        if getattr(body, name) is not None:
            other = "choices" if body.choices is not None else "context"
            raise OptionError(f"{name} means nothing with {other}", hint="leave it out", option=name)
    if body.max_answer_tokens is not None:
        check_integer("max_answer_tokens", body.max_answer_tokens, low=1)
    if body.stride is not None:
        check_integer("stride", body.stride, low=0)


def _for_each(body: AnswerRequest, count: int) -> Seq[Any]:
    """The context, or the choices, of each question."""
    name = "context" if body.choices is None else "choices"
    given: Any = body.context if body.choices is None else body.choices
    is_one = isinstance(given, str) if body.choices is None else isinstance(given[0], str)
    if is_one:
        return [given] * count
    if len(given) != count:
        raise OptionError(
            f"{name} has {len(given)} for {count} of question", hint="send one, or one for each", option=name
        )
    return cast("Seq[Any]", given)
