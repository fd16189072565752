"""/v1/responses: answers to conversations that the server keeps."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.completion import Chunk, Completion
from fastserve.engine.loaded_model import LoadedModel
from fastserve.errors import FastServeError, RequestError, StepError
from fastserve.serve.chat_prompt import make_chat_prompt
from fastserve.serve.chat_tools import ChatTools
from fastserve.serve.connection import client_gone, closing_with_client
from fastserve.serve.errors import judge, naming
from fastserve.serve.generation import Generation, GenerationRequest
from fastserve.serve.logprob import LogprobWriter
from fastserve.serve.record import RequestRecord
from fastserve.serve.response_output import Event, ResponseOutput
from fastserve.serve.response_store import KeptResponse, ResponseStore
from fastserve.serve.schema.body import ERRORS, STREAMED
from fastserve.serve.schema.responses import DeletedResponse, ResponseDocument, ResponsesRequest
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import event, json_response, stream, to_json_text

logger = logging.getLogger(__name__)

_ANSWERED = ("completed", "incomplete")  # statuses of responses that a conversation may go on from
_NAMES = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}  # fields by the options they set


def responses_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"], responses=ERRORS)
    store = ResponseStore(service.options.max_responses, service.options.response_memory_bytes)
    in_background: set[asyncio.Task[None]] = set()

    @router.post("/v1/responses", response_model=ResponseDocument, responses=STREAMED)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        body.check()
        owner = tenant_of(request.scope, None)
        messages = [*_messages_before(body, store, owner), *body.to_template()]
        system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
        async with service.generator(body.model, request, timeout_ms=body.timeout_ms) as llm:
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
                    LogprobWriter(llm.model.target_tokenizer),
                    ResponseOutput(prompt.tools),
                    response=_new_document(body, asked),
                    messages=messages,
                    owner=owner,
                    store=None if body.store is False else store,
                )
                context = service.generate(llm, asked, request)
                if body.stream:
                    return await stream(context, writer, service.options)
                if not body.background:
                    async with context as generation, closing_with_client(request.receive, generation):
                        await writer.read(generation)
                    if not writer.is_complete:
                        raise client_gone()
                    writer.keep()
                    return json_response(writer.response)
                stack = AsyncExitStack()
                generation = await stack.enter_async_context(context)
            try:
                writer.begin(generation)
            except BaseException:
                await stack.aclose()
                raise
            record = RequestRecord.of(request.scope)
            record.goes_on = True
            task = asyncio.create_task(_finish(writer, generation, stack, record))
            in_background.add(task)
            task.add_done_callback(in_background.discard)
            service.drain.begin()
            task.add_done_callback(lambda _: service.drain.end())
            return json_response(writer.response)

    @router.get("/v1/responses/{response_id}", response_model=ResponseDocument)
    async def get_response(response_id: str, request: Request) -> Response:
        _check_no_query(request)
        return _answer(store.find(response_id, tenant_of(request.scope, None)))

    @router.delete("/v1/responses/{response_id}", response_model=DeletedResponse)
    async def delete_response(response_id: str, request: Request) -> Response:
        store.delete(response_id, tenant_of(request.scope, None))
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{response_id}/cancel", response_model=ResponseDocument)
    async def cancel_response(response_id: str, request: Request) -> Response:
        """One that is streamed or in the background ends where it is; one that has ended stays as it is."""
        response = store.find(response_id, tenant_of(request.scope, None))
        if response.cancel is not None:
            response.cancel()
        return _answer(response)

    return router


class ResponseFormat:
    """`response` and its events. What is to be kept goes into a store: when its beginning is told, or, of one
    that is answered whole, when it is complete.

    Args:
        response: its document, in progress.
        messages: the conversation that it answers.
    """

    def __init__(
        self,
        logprobs: LogprobWriter,
        output: ResponseOutput,
        *,
        response: Mapping[str, Any],
        messages: Seq[Mapping[str, Any]],
        owner: str,
        store: ResponseStore | None,
    ) -> None:
        self._logprobs = logprobs
        self._output = output
        self._messages = messages
        self._store = store
        self._kept = KeptResponse(response_id=response["id"], owner=owner)
        self._is_kept = False
        self._num_events = 0
        self._last_events: Seq[Event] = ()  # of a response that was stopped
        self.response = response

    def begin(self, generation: Generation) -> bytes:
        self._kept.cancel = partial(self._cancel, generation)
        self.keep()
        return b"".join(
            (
                self._event("response.created", response=self.response),
                self._event("response.in_progress", response=self.response),
                *self._events(self._output.begin()),
            )
        )

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        return b"".join(self._events(self._take(chunk)))

    def end(self, generation: Generation) -> bytes:
        self._stop("cancelled")  # unless it is complete
        status = self.response["status"]
        name = f"response.{'incomplete' if status == 'cancelled' else status}"  # there is no other for it
        return b"".join((*self._events(self._last_events), self._event(name, response=self.response)))

    def error(self, error: FastServeError) -> bytes:
        self._stop("failed", error={"code": judge(error).code, "message": str(error)})
        return b"".join(
            (*self._events(self._last_events), self._event("response.failed", response=self.response))
        )

    async def read(self, generation: Generation) -> None:
        """What would be streamed, where nobody reads its events. Raises as `Generation.read`."""
        if not self._output.items:
            self._output.begin()
        while not generation.has_ended:
            for _, chunk in await generation.read():
                self._take(chunk)

    @property
    def is_complete(self) -> bool:
        return self.response["status"] in _ANSWERED

    def _take(self, chunk: Chunk) -> list[Event]:
        logprobs = [] if chunk.logprobs is None else [self._logprobs.chat(chunk.logprobs)]
        events = self._output.take(chunk.text, logprobs, is_last=chunk.completion is not None)
        return events if chunk.completion is None else events + self._complete(chunk.completion)

    def _complete(self, completion: Completion) -> list[Event]:
        status = "incomplete" if completion.finish_reason == "length" else "completed"
        events = self._output.finish(status)
        self._messages = [*self._messages, self._output.to_template()]
        self._update(
            status=status,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            output=self._output.items,
            usage=_usage(completion),
        )
        return events

    def _cancel(self, generation: Generation) -> None:
        """Have what is being generated end where it is."""
        generation.close()
        self._stop("cancelled")
        generation.nudge()

    def _stop(self, status: str, **fields: Any) -> None:
        """End a response that is in progress with what has come so far."""
        if self.response["status"] != "in_progress":
            return
        rest = self._output.take("", (), is_last=True)
        self._last_events = rest + (self._output.finish("incomplete") if self._output.items else [])
        self._update(status=status, output=self._output.items, **fields)

    def _update(self, **fields: Any) -> None:
        self.response = {**self.response, **fields}
        self._kept.cancel = None
        if self._is_kept and self._store is not None:
            self._write()
            self._store.update(self._kept)

    def keep(self) -> None:
        """Into the store, if it is to be kept."""
        self._is_kept = True
        if self._store is not None:
            self._write()
            self._store.keep(self._kept)

    def _write(self) -> None:
        kept = self._kept
        kept.status = self.response["status"]
        kept.document = to_json_text(self.response).encode()
        if kept.status in _ANSWERED:
            kept.messages = to_json_text(self._messages).encode()

    def _events(self, events: Seq[Event]) -> Iterator[bytes]:
        return (self._event(type_, **fields) for type_, fields in events)

    def _event(self, type_: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return event(to_json_text({"type": type_, "sequence_number": number, **fields}), type_)


async def _finish(
    writer: ResponseFormat, generation: Generation, stack: AsyncExitStack, record: RequestRecord
) -> None:
    """Generate a response in the background: as it would be streamed, but nobody reads it."""
    try:
        async with stack:
            try:
                await writer.read(generation)
                writer.end(generation)
            except FastServeError as error:
                writer.error(error)
                logger.warning("%s has failed in the background: %s", writer.response["id"], error)
            except Exception as error:
                logger.exception("%s has failed in the background by a defect", writer.response["id"])
                writer.error(StepError(f"the server has failed by a defect: {type(error).__name__}"))
    finally:
        record.details["response_status"] = writer.response["status"]
        record.write()


def _answer(response: KeptResponse) -> Response:
    return Response(response.document, media_type="application/json")


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


def _messages_before(body: ResponsesRequest, store: ResponseStore, owner: str) -> list[Mapping[str, Any]]:
    """The conversation that the request goes on with.

    Raises:
        RequestError: there is no such response, or it has no answer yet.
    """
    if body.previous_response_id is None:
        return []
    response = store.find(body.previous_response_id, owner, param="previous_response_id")
    if response.status not in _ANSWERED:
        raise RequestError(
            f"previous_response_id={body.previous_response_id!r} is {response.status}",
            status=400,
            code="response_not_complete",
            param="previous_response_id",
        )
    return list(json.loads(response.messages))


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
