"""`AsyncLLM`: a model for many callers of one event loop, run by a thread of its own."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from fastserve.config import EngineOptions
from fastserve.engine.adapter_table import AdapterTable
from fastserve.engine.completion import Chunk, Completion
from fastserve.engine.engine_of_model import make_constraint_compiler, make_engine, resolve_draft
from fastserve.engine.load import load_model
from fastserve.engine.loaded_model import LoadedModel, check_task
from fastserve.engine.policy import parse_policy
from fastserve.engine.policy.work import LengthPredictor
from fastserve.engine.prompt import Message, Prompt, encode_chat, encode_prompt
from fastserve.engine.snapshot import EngineSnapshot
from fastserve.engine.status import EngineStatus
from fastserve.engine.turnstile import Turnstile
from fastserve.engine.worker import (
    Abort,
    Aborted,
    Add,
    Answer,
    AskSnapshot,
    AskStatus,
    Died,
    EngineEvent,
    EngineWorker,
    Hold,
    SetPolicy,
    SetTenantWeights,
)
from fastserve.errors import ClosedError, FastServeError, StepError
from fastserve.hub.resolve import resolve
from fastserve.types import JsonObject, SamplingParams

_MOST_UNREAD = 256  # chunks of a request: with so many its reader is behind, and it has no turns ...
_FEW_UNREAD = 64  # ... until these are left

Meter = Callable[[int, float], None]
"""Called with the tokens of a request's completions, and seconds of its service, as they are given."""


class Stream:
    """The chunks of one request as they come. Iterate over it; close it to abort the request at any
    moment."""

    def __init__(
        self,
        llm: AsyncLLM,
        ticket: int,
        num_completions: int,
        has_news: asyncio.Event,
        meter: Meter | None = None,
    ) -> None:
        self._llm = llm
        self._ticket = ticket
        self._num_unfinished = num_completions
        self._unread: deque[Chunk] = deque()
        self._has_news = has_news
        self._meter = meter
        self._is_held = False
        self._error: FastServeError | None = None

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if not self._num_unfinished:
                raise StopAsyncIteration
            self._has_news.clear()
            await self._has_news.wait()
        chunk = self._unread.popleft()
        if self._is_held and len(self._unread) <= _FEW_UNREAD:
            self._hold(is_held=False)
        return chunk

    def take(self) -> list[Chunk]:
        """All chunks that have come and are not read; none where there are none.

        Raises:
            StepError, ClosedError: there are none, and the model does not run any more, or was closed.
        """
        if not self._unread and self._error is not None:
            raise self._error
        chunks = list(self._unread)
        self._unread.clear()
        if self._is_held:
            self._hold(is_held=False)
        return chunks

    @property
    def is_going_on(self) -> bool:
        """Whether what has come and is not read are chunks in the midst of completions."""
        return (
            self._num_unfinished > 0
            and self._error is None
            and not any(chunk.completion is not None for chunk in self._unread)
        )

    @property
    def has_ended(self) -> bool:
        """Whether no chunk will come that has not been read."""
        return not self._num_unfinished and not self._unread

    def close(self) -> None:
        """Abort the request, if it has not ended. Closing again does nothing."""
        self._num_unfinished = 0
        self._unread.clear()
        self._has_news.set()
        self._llm._forget(self._ticket)

    def _push(self, chunk: Chunk) -> bool:
        """A chunk has come; whether it was the last."""
        self._unread.append(chunk)
        if self._meter is not None:
            self._meter(chunk.token_id is not None, chunk.service_seconds)
        self._num_unfinished -= chunk.completion is not None
        if self._num_unfinished and not self._is_held and len(self._unread) >= _MOST_UNREAD:
            self._hold(is_held=True)
        return self._num_unfinished == 0

    def _break(self, error: FastServeError) -> None:
        self._error = error
        self._has_news.set()

    def _hold(self, *, is_held: bool) -> None:
        self._is_held = is_held
        self._llm._worker.send(Hold(self._ticket, is_held))


class AsyncLLM:
    """A model loaded into this process, for the coroutines of one event loop.

    One thread runs the steps; what it gives back comes to the loop once a step. A stream whose reader is
    behind by 256 chunks gets no turns until it has caught up.

    >>> async def main() -> None:
    ...     async with AsyncLLM("smollm2-135m-instruct") as llm:
    ...         async for chunk in llm.stream("Gravity is", SamplingParams(max_tokens=16)):
    ...             print(chunk.text, end="")

    Args:
        model: a short name, a source, a folder or a .gguf file; or a model that is loaded already, with the
            same options, and from here on this one's.
        offline: open no network connection.
        name: what messages call the model; by default what `model` says.
        length_predictor: as of `fastserve.LLM`.
        turnstile: that models on the same cores share, so that they take turns step by step; None: there are
            no others.

    Raises:
        As `fastserve.LLM`.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel,
        options: EngineOptions | None = None,
        *,
        offline: bool = False,
        name: str | None = None,
        length_predictor: LengthPredictor | None = None,
        turnstile: Turnstile | None = None,
    ) -> None:
        options = options or EngineOptions()
        parse_policy(options.policy)  # before anything is loaded
        if isinstance(model, LoadedModel):
            self.name = name or model.checkpoint.path.name
            check_task("generate", model.settings, self.name)
            self.model = model
        else:
            self.name = name or str(model)
            path = resolve(model, offline=offline)
            options = resolve_draft(options, offline=offline)
            self.model = load_model(path, options, name=self.name, task="generate")
        self.adapters = AdapterTable.of(self.model, options, model_name=self.name)
        self._constraints = make_constraint_compiler(self.model)
        self._tickets = count()
        self._streams: dict[int, Stream] = {}
        self._aborting: dict[int, Meter] = {}  # of streams that were closed, until the engine has answered
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._closing: asyncio.Future[None] | None = None
        self._worker = EngineWorker(
            make_engine(self.model, options, length_predictor=length_predictor, turnstile=turnstile),
            self._deliver,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str = "",
        endpoint: str = "",
        priority_class: str | None = None,
        timeout_ms: float | None = None,
        session: str = "",
        arrival_seconds: float | None = None,
        has_news: asyncio.Event | None = None,
        meter: Meter | None = None,
        name: str = "",
    ) -> Stream:
        """Queue a request; its chunks come from the stream. The caller closes it. What is not named here is
        as of `LLM.generate`.

        Args:
            arrival_seconds: when it came, by `time.perf_counter`, from which `timeout_ms` counts; None is
                now.
            has_news: set when there is something to `take`, or the stream has broken: streams that are read
                together share one.
            meter: gets tokens and seconds of service as the engine gives them, whether or not they are read,
                and the rest soon after the stream was closed.
            name: what snapshots call the request.

        Raises:
            OptionError, ContextLengthError, MemoryLimitError: it is refused; see `Engine.add`.
            ConstraintError: its constraint cannot be compiled.
            QueueFullError: as many requests wait as may; it says when to try again.
            DeadlineError: it cannot be complete in time.
            ModelNotFoundError: there is no such adapter.
        """
        arrival_seconds = time.perf_counter() if arrival_seconds is None else arrival_seconds
        self._check_open()
        check_task("generate", self.model.settings, self.name)
        params = params or SamplingParams()
        served = None if adapter is None else self.adapters.find(adapter)
        if isinstance(prompt, str):
            prompt = await asyncio.to_thread(encode_prompt, self.model, prompt)
        guide = None
        if params.constraint is not None:
            guide = await asyncio.to_thread(self._constraints.compile, params.constraint)
        ticket = next(self._tickets)
        stream = Stream(self, ticket, params.n, has_news or asyncio.Event(), meter)
        self._streams[ticket] = stream
        command = Add(
            ticket=ticket,
            prompt_ids=prompt,
            params=params,
            priority=priority,
            tenant=tenant,
            endpoint=endpoint,
            priority_class=priority_class,
            timeout_ms=timeout_ms,
            session=session,
            arrival_seconds=arrival_seconds,
            guide=guide,
            adapter=served,
            name=name,
        )
        try:
            await self._ask(command)
        except BaseException:
            stream.close()
            raise
        return stream

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str = "",
        endpoint: str = "",
        priority_class: str | None = None,
        timeout_ms: float | None = None,
        session: str = "",
    ) -> AsyncGenerator[Chunk, None]:
        """Complete a prompt token by token. Closing the generator aborts the request. See `submit`."""
        stream = await self.submit(
            prompt,
            params,
            adapter=adapter,
            priority=priority,
            tenant=tenant,
            endpoint=endpoint,
            priority_class=priority_class,
            timeout_ms=timeout_ms,
            session=session,
        )
        try:
            async for chunk in stream:
                yield chunk
        finally:
            stream.close()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str = "",
        endpoint: str = "",
        priority_class: str | None = None,
        timeout_ms: float | None = None,
        session: str = "",
    ) -> list[Completion]:
        """The `n` completions of a prompt. Cancelling the call aborts the request. See `submit`."""
        stream = await self.submit(
            prompt,
            params,
            adapter=adapter,
            priority=priority,
            tenant=tenant,
            endpoint=endpoint,
            priority_class=priority_class,
            timeout_ms=timeout_ms,
            session=session,
        )
        try:
            completions = [chunk.completion async for chunk in stream if chunk.completion is not None]
        finally:
            stream.close()
        return sorted(completions, key=lambda completion: completion.index)

    def chat_prompt(
        self,
        messages: Seq[Message],
        *,
        tools: Seq[JsonObject] | None = None,
        variables: JsonObject | None = None,
    ) -> Seq[int]:
        """The token ids of a conversation that is to be answered. See `encode_chat`."""
        return encode_chat(self.model, messages, tools=tools, variables=variables)

    async def load_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter beside the model. See `LLM.load_adapter`."""
        self._check_open()
        await asyncio.to_thread(self.adapters.load, name, path)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that have it go on. Raises ModelNotFoundError where there is none."""
        self.adapters.unload(name)

    async def set_policy(self, spec: str) -> None:
        """Go on by another scheduling policy.

        Raises:
            OptionError: an unknown policy or knob, or a value out of its range.
        """
        await self._ask(SetPolicy(next(self._tickets), spec))

    async def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        """Have these tenants known from now on, by these weights, besides those of the options.

        Raises:
            OptionError: see `Engine.set_tenant_weights`.
        """
        await self._ask(SetTenantWeights(next(self._tickets), dict(weights)))

    async def status(self) -> EngineStatus:
        """What the engine is doing, between two steps."""
        answer = await self._ask(AskStatus(next(self._tickets)))
        assert answer.status is not None
        return answer.status

    async def snapshot(self) -> EngineSnapshot:
        """Its sequences, memory and latest preemptions, between two steps."""
        answer = await self._ask(AskSnapshot(next(self._tickets)))
        assert answer.snapshot is not None
        return replace(answer.snapshot, model=self.name)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._streams)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs, as it does until `close`, unless by a defect."""
        return self._worker.is_alive

    @property
    def seconds_without_step(self) -> float:
        """How long ago a step has ended, or work came; 0 where there is nothing to do."""
        return self._worker.seconds_without_step

    async def close(self) -> None:
        """Stop the thread. What is still streaming ends with an error; closing again does
        nothing."""
        if self._closing is None:
            self._is_closed = True
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)  # to its end, whoever gives up waiting for it

    async def _close(self) -> None:
        await asyncio.to_thread(self._worker.stop)
        self._break_all(self._closed_error())

    def _break_all(self, error: FastServeError) -> None:
        for stream in self._streams.values():
            stream._break(error)
        for future in self._answers.values():
            if not future.done():
                future.set_exception(error)
        self._streams.clear()
        self._aborting.clear()
        self._answers.clear()

    def _check_open(self) -> None:
        if self._is_closed:
            raise self._closed_error()
        if self._worker.failure is not None:
            raise StepError(f"the model {self.name!r} does not run: {self._worker.failure}")

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the model {self.name!r} is closed", hint="make a new AsyncLLM")

    async def _ask(self, command: Add | SetPolicy | SetTenantWeights | AskStatus | AskSnapshot) -> Answer:
        """Send a command that is answered. Raises what it is refused with."""
        self._check_open()
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._answers[command.ticket] = future
        self._worker.send(command)
        try:
            answer = await future
        finally:
            self._answers.pop(command.ticket, None)
        if answer.error is not None:
            raise answer.error
        return answer

    def _deliver(self, events: list[EngineEvent]) -> None:
        """In the worker's thread: one hand-off for all that a step has brought."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[EngineEvent]) -> None:
        news: dict[int, asyncio.Event] = {}  # by id: streams may share one, which is set once all has come
        for event in events:
            if isinstance(event, Answer):
                future = self._answers.get(event.ticket)
                if future is not None and not future.done():
                    future.set_result(event)
            elif isinstance(event, Died):
                self._break_all(StepError(f"the model {self.name!r} does not run: {event.reason}"))
            elif isinstance(event, Aborted):
                if meter := self._aborting.pop(event.ticket, None):
                    meter(0, event.service_seconds)
            else:
                stream = self._streams.get(event.ticket)
                if stream is None:
                    if meter := self._aborting.get(event.ticket):
                        meter(event.chunk.token_id is not None, event.chunk.service_seconds)
                    continue
                news[id(stream._has_news)] = stream._has_news
                if stream._push(event.chunk):
                    del self._streams[event.ticket]
        for has_news in news.values():
            has_news.set()

    def _forget(self, ticket: int) -> None:
        """A stream was closed: abort what has not ended."""
        stream = self._streams.pop(ticket, None)
        if stream is not None and not self._is_closed:
            if stream._meter is not None:
                self._aborting[ticket] = stream._meter
            self._worker.send(Abort(ticket))
