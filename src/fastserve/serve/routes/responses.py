"""/v1/responses: answers to conversations that the server keeps."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.completion import Chunk, Completion
from fastserve.engine.load import LoadedModel
from fastserve.errors import FastServeError, RequestError, StepError
from fastserve.serve.chat_prompt import make_chat_prompt
from fastserve.serve.chat_tools import ChatTools
from fastserve.serve.errors import judge, naming
from fastserve.serve.generation import Generation, GenerationRequest
from fastserve.serve.logprob import LogprobWriter
from fastserve.serve.response_output import Event, ResponseOutput
from fastserve.serve.response_store import KeptResponse, ResponseStore
from fastserve.serve.schema.body import ERRORS, STREAMED
from fastserve.serve.schema.responses import DeletedResponse, ResponseDocument, ResponsesRequest
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import event, json_response, to_json_text

logger = logging.getLogger(__name__)

_NAMES = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}  # fields by the options they set


def responses_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"], responses=ERRORS)
    store = ResponseStore(service.options.max_responses)
    in_background: set[asyncio.Task[None]] = set()

    @router.post("/v1/responses", response_model=ResponseDocument, responses=STREAMED)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        body.check()
        llm = service.models.find_generator(body.model)
        owner = tenant_of(request.scope, None)
        messages = [*_messages_before(body, store, owner), *body.to_template()]
        system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
        with naming(_NAMES, prompt="input", constraint=body.constraint_field or "tools"):
            prompt = await make_chat_prompt(
                llm.model,
                [*system, *messages],
                tools=_to_tools(body, llm.model, messages),
                constraint=body.to_constraint(),
            )
            asked = body.to_request(
                [prompt.token_ids],
                tenant=tenant_of(request.scope, body.user),
                max_tokens=body.max_output_tokens,
                logprobs=body.num_logprobs,
                constraint=prompt.constraint,
                skip_special_tokens=prompt.skip_special_tokens,
            )
            writer = ResponseFormat(
                LogprobWriter(llm.model.tokenizer),
                ResponseOutput(prompt.tools),
                kept=KeptResponse(owner=owner, messages=messages, document=_new_document(body, asked)),
                store=None if body.store is False else store,
            )
            if not body.background:
                return await service.answer(llm, asked, writer, request, is_streamed=bool(body.stream))
            stack = AsyncExitStack()
            generation = await stack.enter_async_context(service.generate(llm, asked, request))
        writer.begin(generation)
        task = asyncio.create_task(_finish(writer, generation, stack))
        in_background.add(task)
        task.add_done_callback(in_background.discard)
        return json_response(writer.kept.document)

    @router.get("/v1/responses/{response_id}", response_model=ResponseDocument)
    async def get_response(response_id: str, request: Request) -> Response:
        _check_no_query(request)
        return json_response(store.find(response_id, tenant_of(request.scope, None)).document)

    @router.delete("/v1/responses/{response_id}", response_model=DeletedResponse)
    async def delete_response(response_id: str, request: Request) -> Response:
        store.delete(response_id, tenant_of(request.scope, None))
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{response_id}/cancel", response_model=ResponseDocument)
    async def cancel_response(response_id: str, request: Request) -> Response:
        """One that is streamed or in the background ends where it is; one that has ended stays as it is."""
        response = store.find(response_id, tenant_of(request.scope, None))
        if response.generation is not None:
            response.cancel()
            response.document = {**response.document, "status": "cancelled"}
        return json_response(response.document)

    return router


class ResponseFormat:
    """`response` and its events; keeps it where it is to be kept."""

    def __init__(
        self,
        logprobs: LogprobWriter,
        output: ResponseOutput,
        *,
        kept: KeptResponse,
        store: ResponseStore | None,
    ) -> None:
        self._logprobs = logprobs
        self._output = output
        self._store = store
        self._num_events = 0
        self._completion: Completion | None = None
        self._is_streamed = False
        self._is_kept = False
        self.kept = kept

    def begin(self, generation: Generation) -> bytes:
        self.kept.generation = generation
        self._keep()
        response = self.kept.document
        return b"".join(
            (
                self._event("response.created", response=response),
                self._event("response.in_progress", response=response),
                *self._events(self._output.begin()),
            )
        )

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        self._is_streamed = True
        self._completion = chunk.completion
        logprobs = [] if chunk.logprobs is None else [self._logprobs.chat(chunk.logprobs)]
        events = self._output.take(chunk.text, logprobs, is_last=chunk.completion is not None)
        return b"".join(self._events(events))

    def end(self, generation: Generation) -> bytes:
        if self._completion is None or self._is_cancelled:
            self._update(status="cancelled")
            return self._event("response.incomplete", response=self.kept.document)
        ends = [*self._events(self._output.finish(_status(self._completion)))]
        response = self.document([self._completion], generation)
        return b"".join((*ends, self._event(f"response.{response['status']}", response=response)))

    def error(self, error: FastServeError) -> bytes:
        self._update(status="failed", error={"code": judge(error).code, "message": str(error)})
        return self._event("response.failed", response=self.kept.document)

    def document(self, completions: Seq[Completion], generation: Generation) -> Mapping[str, Any]:
        if not completions or self._is_cancelled:
            self._update(status="cancelled")
            return self.kept.document
        (completion,) = completions
        has_begun = self._is_kept
        status, output = _status(completion), self._output
        if not self._is_streamed:
            if not output.items:
                output.begin()
            logprobs = [self._logprobs.chat(logprobs) for logprobs in completion.logprobs or ()]
            output.take(completion.text, logprobs, is_last=True)
            output.finish(status)
        self._update(
            status=status,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            output=output.items,
            usage=_usage(completion),
        )
        self.kept.messages = [*self.kept.messages, output.to_template()]
        if not has_begun:  # what has begun was kept then, and may have been deleted since
            self._keep()
        return self.kept.document

    @property
    def _is_cancelled(self) -> bool:
        return bool(self.kept.document["status"] == "cancelled")

    def _update(self, **fields: Any) -> None:
        self.kept.document = {**self.kept.document, **fields}
        self.kept.generation = None

    def _keep(self) -> None:
        self._is_kept = True
        if self._store is not None:
            self._store.keep(self.kept)

    def _events(self, events: Seq[Event]) -> Iterator[bytes]:
        return (self._event(type_, **fields) for type_, fields in events)

    def _event(self, type_: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return event(to_json_text({"type": type_, "sequence_number": number, **fields}), type_)


async def _finish(writer: ResponseFormat, generation: Generation, stack: AsyncExitStack) -> None:
    """Generate a response in the background."""
    async with stack:
        try:
            writer.document(await generation.read_all(), generation)
        except FastServeError as error:
            writer.error(error)
            logger.warning("%s has failed in the background: %s", writer.kept.document["id"], error)
        except Exception as error:
            logger.exception("%s has failed in the background by a defect", writer.kept.document["id"])
            writer.error(StepError(f"the server has failed by a defect: {type(error).__name__}"))


def _status(completion: Completion) -> str:
    return "incomplete" if completion.finish_reason == "length" else "completed"


def _to_tools(
    body: ResponsesRequest, model: LoadedModel, messages: Seq[Mapping[str, Any]]
) -> ChatTools | None:
    return ChatTools.of(
        model,
        None if body.tools is None else [tool.to_function() for tool in body.tools],
        body.function_choice,
        body.parallel_tool_calls,
        has_calls=any(message.get("tool_calls") for message in messages),
    )


def _messages_before(body: ResponsesRequest, store: ResponseStore, owner: str) -> Seq[Mapping[str, Any]]:
    """The conversation that the request goes on with.

    Raises:
        RequestError: there is no such response, or it has no answer yet.
    """
    if body.previous_response_id is None:
        return ()
    response = store.find(body.previous_response_id, owner, param="previous_response_id")
    status = response.document["status"]
    if status not in ("completed", "incomplete"):
        raise RequestError(
            f"previous_response_id={body.previous_response_id!r} is {status}",
            status=400,
            code="response_not_complete",
            param="previous_response_id",
        )
    return response.messages


def _check_no_query(request: Request) -> None:
    """
    Raises:
        RequestError: the address has parameters: there are none.
    """
    for name in request.query_params:
        raise RequestError(
            f"{name[:100]} is not supported", status=400, code="unsupported_parameter", param=name[:100]
        )


def _new_document(body: ResponsesRequest, asked: GenerationRequest) -> dict[str, Any]:
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "temperature": asked.params.temperature,
        "text": {"format": body.format_document},
        "tool_choice": body.tool_choice_document,
        "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": asked.params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _usage(completion: Completion) -> dict[str, Any]:
    return {
        "input_tokens": completion.prompt_tokens,
        "input_tokens_details": {"cached_tokens": completion.cached_tokens},
        "output_tokens": completion.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": completion.prompt_tokens + completion.completion_tokens,
    }
