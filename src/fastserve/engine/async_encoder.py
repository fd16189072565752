"""`AsyncEncoder`: an encoder for many callers of one event loop, run by a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np

from fastserve.config import EngineOptions
from fastserve.engine.adapter_table import AdapterTable
from fastserve.engine.encoder import EncoderInput
from fastserve.engine.loaded_model import LoadedModel, check_task, make_encoder
from fastserve.engine.turnstile import Turnstile
from fastserve.errors import ClosedError, FastServeError, QueueFullError, StepError
from fastserve.types import Float32Array

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """The inputs of one call, and what has come of them."""

    inputs: Seq[EncoderInput]
    future: asyncio.Future[list[Float32Array]]
    loop: asyncio.AbstractEventLoop
    results: list[Float32Array] = field(default_factory=list)
    service_seconds: float = 0.0  # its share of the steps that it was in

    def finish(self, result: list[Float32Array] | FastServeError) -> None:
        """In the encoder's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._set, result)

    def _set(self, result: list[Float32Array] | FastServeError) -> None:
        if self.future.done():  # cancelled
            return
        if isinstance(result, FastServeError):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class AsyncEncoder:
    """An encoder in this process, for the coroutines of one event loop.

    Inputs of all calls are packed into steps, an input of each call in turn, so that nobody waits behind a
    call of thousands. What comes of one does not depend on what it was packed with.

    >>> async def main(model: LoadedModel) -> Float32Array:
    ...     encoder = AsyncEncoder(model, name="all-minilm-l6-v2")
    ...     return await encoder.embed([model.tokenizer.encode("a cat")])

    Args:
        model: the encoder's own from here on.
        options: that it was loaded with: their adapters are loaded beside it.
        max_waiting: most calls that are not finished; more are refused. None is no limit.
        turnstile: as of `AsyncLLM`.

    Raises:
        UnsupportedError: the model generates text.
        As `AdapterTable.load`.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        name: str,
        options: EngineOptions | None = None,
        max_waiting: int | None = None,
        turnstile: Turnstile | None = None,
    ) -> None:
        if model.settings.head is None:
            check_task("embed", model.settings, name)
        self.name = name
        self.model = model
        self.adapters = AdapterTable.of(model, options or EngineOptions(), model_name=name)
        self._max_waiting = max_waiting
        self._turnstile = turnstile or Turnstile()
        self._encoder = make_encoder(model)
        self._inbox: SimpleQueue[_Job | None] = SimpleQueue()
        self._num_unfinished = 0
        self._last_step_seconds = time.monotonic()
        self._seconds_per_call = 0.0
        self._thread = Thread(target=self._run, name="fastserve-encoder", daemon=True)
        self._is_closed = False
        self._thread.start()

    async def load_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter beside the model. See `LLM.load_adapter`."""
        await asyncio.to_thread(self.adapters.load, name, path)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; calls that have it go on. Raises ModelNotFoundError where there is none."""
        self.adapters.unload(name)

    async def embed(
        self,
        texts: Seq[Seq[int]],
        *,
        adapter: str | None = None,
        meter: Callable[[float], None] | None = None,
    ) -> Float32Array:
        """Embed texts, given as token ids with their special tokens, each within the model's context.

        Returns float32 [texts, width]. Arguments and errors as of `run`.
        """
        assert texts, "nothing to embed"
        inputs = [EncoderInput(text) for text in texts]
        return np.stack(await self.run(inputs, adapter=adapter, meter=meter))

    async def run(
        self,
        inputs: Seq[EncoderInput],
        *,
        adapter: str | None = None,
        meter: Callable[[float], None] | None = None,
    ) -> list[Float32Array]:
        """What comes of each input, as of `Encoder.run_all`. Cancelling the call drops what has not been run.

        Args:
            adapter: of all inputs, by name.
            meter: gets the call's seconds of service when it ends, however it ends: its inputs' share of the
                steps that it was in.

        Raises:
            QueueFullError: as many calls wait as may.
            StepError, ClosedError: a step has failed, or the model was closed.
            ModelNotFoundError: there is no such adapter.
        """
        assert inputs, "nothing to run"
        if adapter is not None:
            served = self.adapters.find(adapter)
            inputs = [replace(input_, adapter=served) for input_ in inputs]
        if self._is_closed:
            raise self._closed_error()
        if self._max_waiting is not None and self._num_unfinished >= self._max_waiting:
            seconds = max(self._seconds_per_call, 0.01)
            raise QueueFullError(
                f"{self._num_unfinished} requests wait; max_waiting is {self._max_waiting}",
                retry_after_seconds=seconds,
                hint=f"try again in about {seconds:.2g} seconds",
            )
        loop = asyncio.get_running_loop()
        job = _Job(inputs, loop.create_future(), loop)
        started = time.monotonic()
        if not self._num_unfinished:
            self._last_step_seconds = started
        self._num_unfinished += 1
        try:
            self._inbox.put(job)
            return await job.future
        finally:
            if meter is not None:
                meter(job.service_seconds)
            self._num_unfinished -= 1
            self._seconds_per_call = time.monotonic() - started

    @property
    def num_unfinished(self) -> int:
        """Calls that wait or run."""
        return self._num_unfinished

    @property
    def seconds_without_step(self) -> float:
        """How long ago a step has ended, or work came; 0 where there is nothing to do."""
        return time.monotonic() - self._last_step_seconds if self._num_unfinished else 0.0

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def close(self) -> None:
        """Stop the thread after the step that runs. What is unfinished ends with an error."""
        if not self._is_closed:
            self._is_closed = True
            self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        jobs: deque[_Job] = deque()
        while True:
            try:
                new = self._inbox.get(block=not jobs)
                if new is None:
                    break
                jobs.append(new)
                continue
            except Empty:
                pass
            self._step(jobs)
            self._last_step_seconds = time.monotonic()
        for job in jobs:
            job.finish(self._closed_error())

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the model {self.name!r} is closed", hint="make a new AsyncEncoder")

    def _step(self, jobs: deque[_Job]) -> None:
        """Run one step of the jobs' next inputs, and take out those that are done."""
        for job in [job for job in jobs if job.future.cancelled()]:
            jobs.remove(job)
        turns = self._take_turns(jobs)
        if not turns:
            return
        inputs = [job.inputs[index] for job, index in turns]
        group = next(iter(self._encoder.groups(inputs)))
        started = time.monotonic()
        try:
            with self._turnstile:
                results = self._encoder.run(group)
        except Exception as error:
            logger.exception("a step of %d texts failed", len(group))
            for job in {id(job): job for job, _ in turns[: len(group)]}.values():
                jobs.remove(job)
                job.finish(StepError(f"its step failed: {type(error).__name__}: {error}"))
            return
        share_seconds = (time.monotonic() - started) / len(group)
        for (job, _), result in zip(turns, results, strict=False):
            job.service_seconds += share_seconds
            job.results.append(result)
            if len(job.results) == len(job.inputs):
                jobs.remove(job)
                job.finish(job.results)
        jobs.rotate(-1)

    def _take_turns(self, jobs: deque[_Job]) -> list[tuple[_Job, int]]:
        """Jobs and indices of their next inputs, one of each job in turn, at most as many as a step takes."""
        most = self._encoder.max_inputs
        turns: list[tuple[_Job, int]] = []
        offset = 0
        while len(turns) < most:
            ready = [
                (job, len(job.results) + offset)
                for job in jobs
                if len(job.results) + offset < len(job.inputs)
            ]
            if not ready:
                break
            turns += ready
            offset += 1
        return turns[:most]
