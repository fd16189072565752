"""/v1/completions: prompts gone on from."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import accumulate
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.engine.completion import Chunk, Completion, TokenLogprobs
from fastserve.engine.prompt import Prompt
from fastserve.engine.text import TokenDecoder
from fastserve.errors import FastServeError
from fastserve.serve.choice_stream import ChoiceStream
from fastserve.serve.errors import naming
from fastserve.serve.generation import Generation
from fastserve.serve.logprob import LogprobWriter
from fastserve.serve.schema.body import ERRORS, STREAMED
from fastserve.serve.schema.completion import DEFAULT_MAX_TOKENS, CompletionDocument, CompletionRequest
from fastserve.serve.schema.text_input import to_prompts
from fastserve.serve.security import tenant_of
from fastserve.serve.service import Service
from fastserve.serve.stream import error_event, to_json_text


def completions_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"], responses=ERRORS)

    @router.post("/v1/completions", response_model=CompletionDocument, responses=STREAMED)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        async with service.generator(body.model, request, timeout_ms=body.timeout_ms) as llm:
            with naming(constraint=body.constraint_field):
                prompts = to_prompts(body.prompt)
                wanted = [body.prompt_logprobs, body.logprobs if body.echo else None]
                if body.echo and body.max_tokens == 0:
                    wanted.append(
                        0
                    )  # the engine reads a prompt alone only for its logprobs, be they told or not
                asked = body.to_request(
                    prompts,
                    tenant=tenant_of(request.scope, body.user),
                    max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
                    logprobs=body.logprobs,
                    prompt_logprobs=max((num for num in wanted if num is not None), default=None),
                    constraint=body.to_constraint(),
                )
                model = llm.model
                echoes = await asyncio.to_thread(_echo, model.tokenizer, prompts) if body.echo else None
                format_ = CompletionFormat(
                    body, model.target_tokenizer, num_each=asked.params.n, echoes=echoes
                )
                return await service.answer(llm, asked, format_, request, is_streamed=bool(body.stream))

    return router


class CompletionFormat:
    """`text_completion`, whole or in chunks.

    Args:
        num_each: completions of a prompt.
        echoes: what goes before the completions of each prompt; None: nothing.
    """

    def __init__(
        self, body: CompletionRequest, tokenizer: Tokenizer, *, num_each: int, echoes: Seq[str] | None
    ) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._tokenizer = tokenizer
        self._writer = LogprobWriter(tokenizer)
        self._num_each = num_each
        self._echoes = echoes
        self._num_logprobs = body.logprobs
        self._num_prompt_logprobs = body.prompt_logprobs
        self._prompts: Seq[Seq[int]] = ()
        self._prompt_logprobs: dict[int, Seq[TokenLogprobs]] = {}  # by prompt
        self._decoders: dict[int, TokenDecoder] = {}  # of each completion, where logprobs are asked for
        self._offsets: dict[int, int] = {}  # of each completion's next token, in characters; none has begun
        self._events = ChoiceStream(self._head, has_usage=body.has_usage)

    def begin(self, generation: Generation) -> bytes:
        self._prompts = generation.prompts
        return b""

    def chunk(self, index: int, chunk: Chunk) -> bytes:
        if index not in self._offsets:
            return self._first_chunk(index, chunk)
        if not chunk.text and chunk.logprobs is None and chunk.completion is None:
            return b""
        return self._choice(index, chunk).encode()

    def end(self, generation: Generation) -> bytes:
        return self._events.end(generation.usage)

    def error(self, error: FastServeError) -> bytes:
        return error_event(error)

    def document(self, completions: Seq[Completion], generation: Generation) -> Mapping[str, Any]:
        self._prompts = generation.prompts
        return {
            **self._head,
            "choices": [self._document(index, completion) for index, completion in enumerate(completions)],
            "usage": generation.usage.to_json(),
        }

    def _first_chunk(self, index: int, chunk: Chunk) -> bytes:
        """With what goes before the completion, and what is known of its prompt."""
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs[index // self._num_each] = chunk.prompt_logprobs
        before: dict[str, Any] = {"index": index, "text": self._echo(index)}
        before["logprobs"] = self._begin_logprobs(index)
        if self._num_prompt_logprobs is not None:
            before["prompt_logprobs"] = self._write_prompt(index)
        events = ""
        if before["text"] or "prompt_logprobs" in before:
            events = self._events.choice(to_json_text({**before, "finish_reason": None}))
        return (events + self._choice(index, chunk)).encode()

    def _choice(self, index: int, chunk: Chunk) -> str:
        logprobs = "null"
        if chunk.logprobs is not None:
            logprobs = to_json_text(self._write_logprobs(index, [chunk.logprobs]))
        finish_reason = "null" if chunk.completion is None else f'"{chunk.completion.finish_reason}"'
        return self._events.choice(
            f'{{"index":{index},"text":{to_json_text(chunk.text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish_reason}}}'
        )

    def _document(self, index: int, completion: Completion) -> Mapping[str, Any]:
        if completion.prompt_logprobs:
            self._prompt_logprobs[index // self._num_each] = completion.prompt_logprobs
        logprobs = self._begin_logprobs(index)
        if completion.logprobs is not None:
            more = self._write_logprobs(index, completion.logprobs)
            logprobs = {name: [*(logprobs or {}).get(name, ()), *values] for name, values in more.items()}
        choice = {
            "index": index,
            "text": self._echo(index) + completion.text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
        }
        if self._num_prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._write_prompt(index)
        return choice

    def _echo(self, index: int) -> str:
        return "" if self._echoes is None else self._echoes[index // self._num_each]

    def _begin_logprobs(self, index: int) -> dict[str, list[Any]] | None:
        """Those of the prompt, where it is echoed with them."""
        self._offsets[index] = len(self._echo(index))
        if self._num_logprobs is None:
            return None
        token_ids = self._prompts[index // self._num_each]
        decoder = self._decoders[index] = self._tokenizer.stream_decoder()
        offsets = [0, *accumulate(len(decoder.push(token_id)) for token_id in token_ids)]
        if self._echoes is None:
            return None
        entries = self._prompt_logprobs.get(index // self._num_each, ())
        return {
            "tokens": [self._writer.text(token_id) for token_id in token_ids],
            "token_logprobs": [None, *(entry.logprob for entry in entries)],
            "top_logprobs": [None, *(self._writer.top(entry, self._num_logprobs) for entry in entries)],
            "text_offset": offsets[:-1],
        }

    def _write_logprobs(self, index: int, logprobs: Seq[TokenLogprobs]) -> dict[str, list[Any]]:
        assert self._num_logprobs is not None
        num_top = self._num_logprobs
        decoder = self._decoders[index]
        lengths = (len(decoder.push(lp.token_id)) for lp in logprobs)
        offsets = list(accumulate(lengths, initial=self._offsets[index]))
        self._offsets[index] = offsets.pop()
        return {
            "tokens": [self._writer.text(lp.token_id) for lp in logprobs],
            "token_logprobs": [lp.logprob for lp in logprobs],
            "top_logprobs": [self._writer.top(lp, num_top) for lp in logprobs],
            "text_offset": offsets,
        }

    def _write_prompt(self, index: int) -> list[Any]:
        """`prompt_logprobs`: of each token of the prompt; of the first there is none."""
        num_top = self._num_prompt_logprobs or 0
        entries = self._prompt_logprobs.get(index // self._num_each, ())
        return [None, *(self._writer.prompt(entry, num_top) for entry in entries)]


def _echo(tokenizer: Tokenizer, prompts: Seq[Prompt]) -> list[str]:
    return [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=False) for p in prompts]
