"""/v1/completions: prompts gone on from."""

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

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.engine.completion import Chunk, Completion, TokenLogprobs
from fastserve.engine.prompt import Prompt
from fastserve.errors import FastServeError, OptionError
from fastserve.serve.generation import Generation
from fastserve.serve.logprob import LogprobWriter
from fastserve.serve.schema.body import ERRORS
from fastserve.serve.schema.completion import DEFAULT_MAX_TOKENS, CompletionDocument, CompletionRequest
from fastserve.serve.schema.text_input import to_prompts
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import error_event, event, to_json_text


def completions_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"], responses=ERRORS)

    @router.post("/v1/completions", response_model=CompletionDocument)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        llm = service.models.find_generator(body.model)
        if body.echo and body.logprobs is not None:
            raise OptionError(
                "echo=true with logprobs is not supported", hint="leave one of the two out", option="echo"
            )
        prompts = to_prompts(body.prompt)
        asked = body.to_request(
            prompts,
            tenant=tenant_of(request.scope, body.user),
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
        )
        tokenizer = llm.model.tokenizer
        echoes = await asyncio.to_thread(_echo, tokenizer, prompts) if body.echo else [""] * len(prompts)
        format_ = CompletionFormat(
            body.model,
            LogprobWriter(tokenizer),
            echoes=[echo for echo in echoes for _ in range(asked.params.n)],
            has_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        )
        return await service.answer(llm, asked, format_, request, is_streamed=bool(body.stream))

    return router


class CompletionFormat:
    """`text_completion`, whole or in chunks.

    Args:
        echoes: what goes before each completion.
    """

    def __init__(self, model: str, logprobs: LogprobWriter, *, echoes: Seq[str], has_usage: bool) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._logprobs = logprobs
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]  # of each completion's next token, in characters
        self._event_start = f'data: {to_json_text(self._head)[:-1]},"choices":['
        self._event_end = '],"usage":null}\n\n' if has_usage else "]}\n\n"
        self._has_usage = has_usage

    def begin(self, generation: Generation) -> bytes:
        echoes = (self._choice(i, echo, "null", "null") for i, echo in enumerate(self._echoes) if echo)
        return "".join(echoes).encode()

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        logprobs = "null"
        if chunk.logprobs is not None:
            logprobs = to_json_text(self._write_logprobs(index, [chunk.logprobs]))
        finish_reason = "null" if chunk.completion is None else f'"{chunk.completion.finish_reason}"'
        if not chunk.text and chunk.logprobs is None and chunk.completion is None:
            return b""
        return self._choice(index, chunk.text, logprobs, finish_reason).encode()

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
            "choices": [self._document(index, completion) for index, completion in enumerate(completions)],
            "usage": generation.usage.to_json(),
        }

    def _choice(self, index: int, text: str, logprobs: str, finish_reason: str) -> str:
        return (
            f'{self._event_start}{{"index":{index},"text":{to_json_text(text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish_reason}}}{self._event_end}'
        )

    def _document(self, index: int, completion: Completion) -> Mapping[str, Any]:
        logprobs = completion.logprobs
        return {
            "index": index,
            "text": self._echoes[index] + completion.text,
            "logprobs": None if logprobs is None else self._write_logprobs(index, logprobs),
            "finish_reason": completion.finish_reason,
        }

    def _write_logprobs(self, index: int, logprobs: Seq[TokenLogprobs]) -> Mapping[str, Any]:
        tokens = [self._logprobs.text(lp.token_id) for lp in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [lp.logprob for lp in logprobs],
            "top_logprobs": [self._logprobs.top(lp) for lp in logprobs],
            "text_offset": offsets,
        }


def _echo(tokenizer: Tokenizer, prompts: Seq[Prompt]) -> list[str]:
    return [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=False) for p in prompts]
