"""/v1/chat/completions: answers to conversations."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.completion import Chunk, Completion
from fastserve.engine.prompt import encode_chat
from fastserve.errors import FastServeError
from fastserve.serve.generation import Generation
from fastserve.serve.logprob import LogprobWriter
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.chat import ChatDocument, ChatRequest
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import error_event, event, to_json_text


def chat_completions_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"], responses=ERRORS)

    @router.post("/v1/chat/completions", response_model=ChatDocument)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        llm = service.models.find_generator(body.model)
        messages = [message.to_template() for message in body.messages]
        prompt = await asyncio.to_thread(
            encode_chat, llm.model, messages, variables=body.chat_template_kwargs
        )
        asked = body.to_request(
            [prompt],
            tenant=tenant_of(request.scope, body.user),
            max_tokens=body.most_tokens,
            logprobs=body.num_logprobs,
        )
        format_ = ChatFormat(
            body.model,
            LogprobWriter(llm.model.tokenizer),
            has_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        )
        return await service.answer(llm, asked, format_, request, is_streamed=bool(body.stream))

    return router


class ChatFormat:
    """`chat.completion` and its chunks."""

    def __init__(self, model: str, logprobs: LogprobWriter, *, has_usage: bool) -> None:
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._logprobs = logprobs
        head = to_json_text({**self._head, "object": "chat.completion.chunk"})
        self._event_start = f'data: {head[:-1]},"choices":['
        self._event_end = '],"usage":null}\n\n' if has_usage else "]}\n\n"
        self._has_usage = has_usage

    def begin(self, generation: Generation) -> bytes:
        return "".join(
            self._choice(index, '{"role":"assistant","content":""}', "null", "null")
            for index in range(generation.num_completions)
        ).encode()

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        logprobs = "null"
        if chunk.logprobs is not None:
            logprobs = f'{{"content":[{to_json_text(self._logprobs.chat(chunk.logprobs))}],"refusal":null}}'
        text = ""
        if chunk.text or chunk.logprobs is not None:
            text = self._choice(index, f'{{"content":{to_json_text(chunk.text)}}}', logprobs, "null")
        if chunk.completion is not None:
            text += self._choice(index, "{}", "null", f'"{chunk.completion.finish_reason}"')
        return text.encode()

    def end(self, generation: Generation) -> bytes:
        done = event("[DONE]")
        if not self._has_usage:
            return done
        usage = to_json_text(generation.usage.to_json())
        return f'{self._event_start}],"usage":{usage}}}\n\n'.encode() + done

    def error(self, error: FastServeError) -> bytes:
        return error_event(error)

    def document(self, completions: Seq[Completion], generation: Generation) -> Mapping[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._document(index, completion) for index, completion in enumerate(completions)],
            "usage": generation.usage.to_json(),
        }

    def _choice(self, index: int, delta: str, logprobs: str, finish_reason: str) -> str:
        return (
            f'{self._event_start}{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish_reason}}}{self._event_end}'
        )

    def _document(self, index: int, completion: Completion) -> Mapping[str, Any]:
        logprobs = None
        if completion.logprobs is not None:
            logprobs = {"content": [self._logprobs.chat(lp) for lp in completion.logprobs], "refusal": None}
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }
