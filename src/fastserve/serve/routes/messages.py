"""/v1/messages: answers to conversations, by Anthropic's API."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.completion import Chunk, Completion
from fastserve.engine.prompt import encode_chat
from fastserve.errors import FastServeError
from fastserve.serve.errors import error_object, naming
from fastserve.serve.generation import Generation, GenerationRequest
from fastserve.serve.schema.body import ERRORS, STREAMED
from fastserve.serve.schema.messages import Conversation, MessageDocument, MessagesRequest, TokenCount
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import event, json_response, to_json_text
from fastserve.types import SamplingParams


def messages_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"], responses=ERRORS)

    @router.post("/v1/messages", response_model=MessageDocument, responses=STREAMED)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        llm = service.models.find_generator(body.model)
        asked = GenerationRequest(
            prompts=[await _encode(llm, body)],
            params=_to_params(body),
            tenant=tenant_of(request.scope, body.metadata.user_id if body.metadata else None),
        )
        return await service.answer(
            llm, asked, MessagesFormat(body.model), request, is_streamed=bool(body.stream)
        )

    @router.post("/v1/messages/count_tokens", response_model=TokenCount)
    async def count_tokens(body: Conversation) -> Response:
        """How many tokens a conversation has for the model."""
        prompt = await _encode(service.models.find_generator(body.model), body)
        return json_response({"input_tokens": len(prompt)})

    return router


async def _encode(llm: AsyncLLM, body: Conversation) -> Seq[int]:
    return await asyncio.to_thread(encode_chat, llm.model, body.to_template())


def _to_params(body: MessagesRequest) -> SamplingParams:
    """
    Raises:
        OptionError: a field is out of its range.
    """
    fields: dict[str, Any] = {"top_k": body.top_k, "top_p": body.top_p, "stop": body.stop_sequences}
    with naming({"stop": "stop_sequences"}):
        return SamplingParams(
            max_tokens=body.max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,  # Anthropic's default
            **{name: value for name, value in fields.items() if value is not None},
        )


class MessagesFormat:
    """`message` and its events. A stream begins with the prompt's tokens and ends with the answer's."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._stop: Mapping[str, Any] = {}

    def begin(self, generation: Generation) -> bytes:
        usage = {"input_tokens": generation.usage.prompt_tokens, "output_tokens": 0}
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        block = {"type": "text", "text": ""}
        return _event("message_start", message=message) + _event(
            "content_block_start", index=0, content_block=block
        )

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        if chunk.completion is not None:
            self._stop = _to_stop(chunk.completion)
        if not chunk.text:
            return b""
        return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": chunk.text})

    def end(self, generation: Generation) -> bytes:
        usage = {"output_tokens": generation.usage.completion_tokens}
        return b"".join(
            (
                _event("content_block_stop", index=0),
                _event("message_delta", delta=self._stop, usage=usage),
                _event("message_stop"),
            )
        )

    def error(self, error: FastServeError) -> bytes:
        return _event("error", error=error_object(error))

    def document(self, completions: Seq[Completion], generation: Generation) -> Mapping[str, Any]:
        (completion,) = completions
        usage = generation.usage
        return {
            **self._head,
            "content": [{"type": "text", "text": completion.text}],
            **_to_stop(completion),
            "usage": {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens},
        }


def _event(type_: str, **fields: Any) -> bytes:
    return event(to_json_text({"type": type_, **fields}), type_)


def _to_stop(completion: Completion) -> Mapping[str, Any]:
    reason = "max_tokens" if completion.finish_reason == "length" else "end_turn"
    return {
        "stop_reason": reason if completion.stop_string is None else "stop_sequence",
        "stop_sequence": completion.stop_string,
    }
