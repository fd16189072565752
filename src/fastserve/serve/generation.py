"""From a request to the engine and back: the one way of all routes that generate text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

from fastserve.engine.async_llm import AsyncLLM, Stream
from fastserve.engine.completion import Chunk, Completion
from fastserve.engine.prompt import Prompt, encode_prompt
from fastserve.errors import ContextLengthError, OptionError
from fastserve.serve.metrics import Metrics
from fastserve.serve.options import ServeOptions
from fastserve.serve.record import RequestRecord
from fastserve.serve.tenant_table import Tenant, TenantTable
from fastserve.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a request asks of the engine: completions of prompts, all chosen alike. Fields are those of
    `AsyncLLM.submit`."""

    prompts: Seq[Prompt]
    params: SamplingParams
    tenant: str = ""
    session: str = ""
    priority: int = 0
    priority_class: str | None = None
    timeout_ms: float | None = None


@dataclass(slots=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class News(asyncio.Event):
    """Set when something has come. Who listens may take it at once: whoever waits then goes on sleeping."""

    def __init__(self) -> None:
        super().__init__()
        self.listener: Callable[[], bool] | None = None  # whether it has taken what has come

    def set(self) -> None:
        if self.listener is None or not self.listener():
            super().set()


@dataclass(slots=True, eq=False)
class Generation:
    """The completions of a request as they come. Completion i of prompt p has the index p * n + i."""

    prompts: Seq[Seq[int]]  # token ids
    num_each: int  # completions of a prompt
    streams: list[Stream]
    has_news: News
    observe: Callable[[Completion], None]  # called with each that has ended, failed ones too
    usage: Usage = field(default_factory=Usage)
    first_token_seconds: float | None = None  # when it was read, by time.perf_counter

    @property
    def num_completions(self) -> int:
        return len(self.prompts) * self.num_each

    @property
    def has_ended(self) -> bool:
        """Whether all there is has been read, or the request was closed."""
        return all(stream.has_ended for stream in self.streams)

    async def read(self) -> list[tuple[int, Chunk]]:
        """All chunks that have come, each with its completion's index; none where `nudge` or `close` was
        called, or all has ended.

        Raises:
            DeadlineError, StepError: a completion, or the model, cannot go on.
        """
        chunks = self._take()
        if not chunks and not self.has_ended:
            self.has_news.clear()
            await self.has_news.wait()
            chunks = self._take()
        return chunks

    async def read_all(self) -> list[Completion]:
        """All completions, by index. Raises as `read`."""
        completions: dict[int, Completion] = {}
        while not self.has_ended:
            for index, chunk in await self.read():
                if chunk.completion is not None:
                    completions[index] = chunk.completion
        return [completions[index] for index in sorted(completions)]

    def take(self) -> list[tuple[int, Chunk]] | None:
        """What has come, without waiting, as long as no completion ends with it; else None, and `read` has
        it."""
        return self._take() if all(stream.is_going_on for stream in self.streams) else None

    def nudge(self) -> None:
        """Have who waits in `read` go on, with nothing."""
        self.has_news.set()

    def close(self) -> None:
        """Abort what has not ended."""
        for stream in self.streams:
            stream.close()

    def _take(self) -> list[tuple[int, Chunk]]:
        chunks = [
            (place * self.num_each + chunk.index, chunk)
            for place, stream in enumerate(self.streams)
            for chunk in stream.take()
        ]
        for _, chunk in chunks:
            self.usage.completion_tokens += chunk.token_id is not None  # also of what never ends
            if chunk.completion is not None:
                self.observe(chunk.completion)
                chunk.completion.checked()
        if self.first_token_seconds is None and self.usage.completion_tokens:
            self.first_token_seconds = perf_counter()
        return chunks


@asynccontextmanager
async def generate(
    llm: AsyncLLM,
    request: GenerationRequest,
    *,
    endpoint: str,
    options: ServeOptions,
    metrics: Metrics,
    record: RequestRecord,
    tenants: TenantTable,
    tenant: Tenant,
) -> AsyncIterator[Generation]:
    """Submit a request; leaving the context aborts what has not ended.

    Args:
        endpoint: the path of the route that it came by.
        tenants: whose weights the engine is to share by.
        tenant: whose it is, for limits and usage.

    Raises:
        OptionError, ContextLengthError, MemoryLimitError, RateLimitError, QueueFullError, DeadlineError: it
            is refused, all of it.
    """
    check_counts(request, options)
    prompts = [await encode(llm, prompt, options) for prompt in request.prompts]
    num_tokens = sum(map(len, prompts))
    record.details |= {"model": llm.name, "tenant": request.tenant, "prompt_tokens": num_tokens}
    completed: list[Completion] = []

    def observe(completion: Completion) -> None:
        metrics.observe(llm.name, completion)
        completed.append(completion)
        record.observe(completion)

    generation = Generation(prompts, request.params.n, [], News(), observe)
    generation.usage.prompt_tokens = num_tokens
    opened: list[Stream] = []

    async def submit(prompt: Seq[int]) -> Stream:
        stream = await llm.submit(
            prompt,
            request.params,
            adapter=record.adapter,
            priority=request.priority,
            tenant=request.tenant,
            endpoint=endpoint,
            priority_class=request.priority_class,
            timeout_ms=request.timeout_ms,
            session=request.session,
            arrival_seconds=record.arrival_seconds,
            has_news=generation.has_news,
            meter=tenant.usage.serve,
            name=record.request_id,
        )
        opened.append(stream)
        return stream

    await tenants.tell_weights((llm,))
    with tenant.admit(
        num_tokens, num_completions=generation.num_completions, max_tokens=request.params.max_tokens
    ) as admission:
        try:
            first, *others = prompts  # the first alone: a constraint is compiled once
            generation.streams.append(await submit(first))
            # The engine answers between two steps, all that have come by then.
            generation.streams += await _gather(map(submit, others))
            metrics.prompt_tokens.labels(llm.name).inc(num_tokens)
            tenant.usage.begin(num_tokens)
            admission.used_tokens = num_tokens
            yield generation
        finally:
            for stream in opened:
                stream.close()
            # What was begun and given up has been computed, too.
            num_completion_tokens = generation.usage.completion_tokens
            admission.used_tokens += num_completion_tokens
            num_given_up = num_completion_tokens - sum(c.completion_tokens for c in completed)
            metrics.completion_tokens.labels(llm.name).inc(num_given_up)
            record.details["completion_tokens"] = num_completion_tokens
            record.first_token_seconds = record.first_token_seconds or generation.first_token_seconds
            if options.log_prompts:
                decode = partial(llm.model.tokenizer.decode, skip_special_tokens=False)
                record.details |= {
                    "prompts": list(map(decode, prompts)),
                    "completions": [c.text for c in completed],
                }


async def _gather(submissions: Iterable[Coroutine[Any, Any, Stream]]) -> list[Stream]:
    """All streams, in order. Raises what the first of those raises that fail, when all have ended."""
    answers = await asyncio.gather(*submissions, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if isinstance(answer, Stream)]


def check_counts(request: GenerationRequest, options: ServeOptions) -> None:
    """
    Raises:
        OptionError: the request has no prompts, or more prompts, completions, stop strings or biases than may
            be.
    """
    if not request.prompts:
        raise OptionError("there are no prompts", hint="give at least one", option="prompt")
    params = request.params
    for name, count, limit in (
        ("prompt", len(request.prompts), options.max_prompts),
        ("n", params.n, options.max_n),
        ("stop", len(params.stop), options.max_stops),
        ("stop_token_ids", len(params.stop_token_ids), options.max_stops),
        ("logit_bias", len(params.logit_bias), options.max_logit_biases),
    ):
        if count > limit:
            raise OptionError(
                f"{name} asks for {count}; the most is {limit}", hint="ask for fewer", option=name
            )


async def encode(llm: AsyncLLM, prompt: Prompt, options: ServeOptions) -> Seq[int]:
    """The token ids of a prompt.

    Raises:
        OptionError: the text is not valid Unicode.
        ContextLengthError: it is too long.
    """
    if isinstance(prompt, str):
        prompt = await asyncio.to_thread(encode_prompt, llm.model, prompt)
    limit = options.max_prompt_tokens
    if limit is not None and len(prompt) > limit:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens; max_prompt_tokens is {limit}", hint="shorten the prompt"
        )
    return prompt
