"""Which models are loaded: those that requests ask for, within a budget of memory.

A model that is not loaded is loaded when a request wants it, in the order in which models are wanted. Where
there is no room, models are given up that are not pinned: those that nobody uses first, the least recently
used of them before others; then those that are in use, the one that was loaded first before others. One in
use has its turn first, a time from its load on in which requests are let in; then those that come wait, those
that run have time to end, and its memory goes to the one that is wanted. So nobody waits for ever, whoever
else keeps asking.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from threading import Event
from typing import TypeVar

from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.heap import trim_heap
from fastserve.engine.loaded_model import ModelPlan
from fastserve.errors import (
    ClosedError,
    FastServeError,
    MemoryLimitError,
    ModelMemoryError,
    ModelNotFoundError,
    QueueFullError,
    RequestError,
    StepError,
)
from fastserve.serve.model_entry import Lease, ModelEntry, Opener, ServedModel

_MOST_RETRY_SECONDS = 60.0

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnLoad = Callable[[ServedModel], Awaitable[None]]


class ModelMemory:
    """Loads and unloads the models of one server, on its event loop.

    Args:
        entries: all models; more may come by `add`.
        budget_bytes: of what loaded models take together, by what was reckoned for each; None: nothing is
            given up for another, and a model is loaded as long as the machine has memory.
        turn_seconds: how long a model that is in use lets further requests in, from its load on, while
            another is waited for.
        drain_seconds: how long requests of a model that is given up may go on.
        max_waiting: most requests that wait for one model; more are refused. None is no limit.
        retry_seconds: how long a model is left alone after a load that has failed, for each try may push out
            models that work; twice as long after each failure that follows, up to a minute.
    """

    def __init__(
        self,
        entries: Iterable[ModelEntry],
        *,
        budget_bytes: int | None = None,
        turn_seconds: float = 10.0,
        drain_seconds: float = 300.0,
        max_waiting: int | None = None,
        retry_seconds: float = 1.0,
    ) -> None:
        self.entries = list(entries)
        self.budget_bytes = budget_bytes
        self._turn_seconds = turn_seconds
        self._drain_seconds = drain_seconds
        self._max_waiting = max_waiting
        self._retry_seconds = retry_seconds
        self._wanted: deque[ModelEntry] = deque()  # the one that is loaded next first
        self._keeper: asyncio.Task[None] | None = None
        self._has_changed = asyncio.Event()
        self._is_ending = Event()  # also for the thread that loads
        self._is_closed = False
        self._on_load: list[OnLoad] = []
        # One thread for all loads: what they leave free in its heap the next one takes.
        self._loader = ThreadPoolExecutor(1, "fastserve-loader")

    @property
    def used_bytes(self) -> int:
        """What models take that are loaded, or are on the way in or out."""
        return sum(entry.num_bytes for entry in self.entries if entry.state != "unloaded")

    def add(self, entry: ModelEntry) -> None:
        self.entries.append(entry)

    def forget(self, entry: ModelEntry) -> None:
        """A model is not served any more: who waits for it is refused, and its memory is given back once the
        requests that use it have ended."""
        entry.is_forgotten, entry.is_pinned = True, False
        entry.fail(_forgotten_error(entry))
        if entry.state == "loaded":
            self._give_up(entry)
        elif entry.state == "unloaded":
            self.entries.remove(entry)

    def entry_of(self, model: ServedModel) -> ModelEntry:
        """The entry of a model that is in use.

        Raises:
            ClosedError: it was given up, as its requests had had their time.
        """
        for entry in self.entries:
            if entry.model is model:
                return entry
        raise ClosedError(f"the model {model.name!r} was unloaded", hint="try again")

    def on_load(self, act: OnLoad) -> None:
        """Have this done with each model that is loaded from now on, before requests are let in."""
        self._on_load.append(act)

    def check_fit(self, entry: ModelEntry) -> None:
        """
        Raises:
            ModelMemoryError: it is larger than the budget, or than what pinned models leave of it.
        """
        if self.budget_bytes is None:
            return
        others = [other for other in self.entries if other is not entry]
        pinned = [other for other in others if other.is_pinned]
        left_bytes = self.budget_bytes - sum(other.num_bytes for other in pinned)
        if entry.num_bytes > left_bytes:
            raise self._does_not_fit(entry, left_bytes, pinned)

    def enter(self, entry: ModelEntry, *, is_urgent: bool = False) -> Lease:
        """A request's use of a model, which is loaded for it where it must be. The caller closes the lease.

        Args:
            is_urgent: try to load it also where that has failed just now.

        Raises:
            RequestError, ModelMemoryError: its last load has failed just now, and nobody tries another.
            ModelNotFoundError: it is not served any more.
            QueueFullError: as many requests wait for the model as may.
            ClosedError: the server ends.
        """
        lease = Lease(entry)
        if entry.is_open:
            lease.grant()
            return lease
        self._check_going_on()
        if entry.is_forgotten:
            raise _forgotten_error(entry)
        pause_seconds = entry.seconds_until_retry(self._retry_seconds, _MOST_RETRY_SECONDS)
        is_tried = bool(entry.waiting) or entry.state == "loading"
        if pause_seconds and entry.failure is not None and not (is_urgent or is_tried):
            raise self._to_answer(entry, entry.failure, f"it is tried again in {pause_seconds:.2g} seconds")
        if self._max_waiting is not None and len(entry.waiting) >= self._max_waiting:
            seconds = max(1.0, entry.load_seconds / max(entry.num_loads, 1))
            raise QueueFullError(
                f"{len(entry.waiting)} requests wait for the model {entry.name!r} to be loaded; max_waiting "
                f"is {self._max_waiting}",
                retry_after_seconds=seconds,
                hint=f"try again in about {seconds:.2g} seconds",
            )
        entry.waiting.append(lease)
        self._want(entry)
        return lease

    def leave(self, lease: Lease) -> None:
        """Close a lease."""
        lease.close()
        self._has_changed.set()

    @contextmanager
    def holding(self, entry: ModelEntry) -> Iterator[None]:
        """Keep a model that is in use already, for something that may go on for longer."""
        entry.hold()
        try:
            yield
        finally:
            entry.let_go()
            self._has_changed.set()

    async def load(self, entry: ModelEntry) -> None:
        """Have a model loaded, also where that has failed just now. Raises as `enter`, and what its load
        fails with."""
        lease = self.enter(entry, is_urgent=True)
        try:
            await lease.wait()
        finally:
            self.leave(lease)

    async def unload(self, entry: ModelEntry) -> None:
        """Have a model's memory given back, once the requests that use it have ended; a later request loads
        it again.

        Raises:
            RequestError: it is pinned.
        """
        if entry.is_pinned:
            raise RequestError(
                f"the model {entry.name!r} is pinned and stays loaded",
                status=409,
                code="model_pinned",
                param="model",
                hint="start the server without --pinned for it"
                if entry.opener is not None
                else "end the server",
            )
        while entry.state == "loading" and entry.changing is not None:
            await asyncio.shield(entry.changing)
        if entry.state == "loaded":
            self._give_up(entry)
        if entry.changing is not None:
            await asyncio.shield(entry.changing)

    def stop_loading(self) -> None:
        """Give up what is being loaded, and refuse who waits for a model: the server ends. Models that are
        loaded go on.
        """
        self._is_ending.set()
        self._has_changed.set()
        for entry in self.entries:
            entry.fail(_closed_error())

    async def close(self) -> None:
        """Stop them all. Whatever is still streaming ends with an error, and who waits is refused."""
        self.stop_loading()
        self._is_closed = True
        entries = list(self.entries)  # which those leave that are not served any more
        for entry in entries:
            if entry.model is not None:
                await entry.model.close()
            entry.is_idle.set()  # who waits for that goes on
        for entry in entries:
            if entry.changing is not None:
                await asyncio.shield(entry.changing)
        if self._keeper is not None:
            await asyncio.shield(self._keeper)
        self._loader.shutdown(wait=False)

    def _check_going_on(self) -> None:
        """
        Raises:
            ClosedError: the server ends.
        """
        if self._is_ending.is_set():
            raise _closed_error()

    async def _run(self, act: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader, act)

    def _want(self, entry: ModelEntry) -> None:
        if entry not in self._wanted:
            self._wanted.append(entry)
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        """Load what is wanted, one after the other."""
        while self._wanted:
            entry = self._wanted[0]
            try:
                await self._bring(entry)
            except FastServeError as error:
                is_given_up = self._is_ending.is_set()
                entry.fail(error if is_given_up else self._note_failure(entry, error))
            except Exception as error:
                logger.exception("the model %s could not be loaded by a defect", entry.name)
                defect = StepError(f"{type(error).__name__}: {error}")
                entry.fail(self._note_failure(entry, defect))
            self._wanted.popleft()

    async def _bring(self, entry: ModelEntry) -> None:
        """Have a model loaded, if anybody still waits for it."""
        while entry.changing is not None:
            await asyncio.shield(entry.changing)
        if entry.state == "loaded":
            entry.grant()
        if not self._is_wanted(entry):
            return
        assert entry.opener is not None
        if entry.plan is None or entry.error is not None:  # files that are damaged push nobody out
            entry.plan = await self._run(entry.opener.plan)
        await self._make_room(entry)
        if self._is_wanted(entry):
            await self._load(entry)

    def _is_wanted(self, entry: ModelEntry) -> bool:
        return bool(entry.waiting) and not self._is_ending.is_set()

    async def _make_room(self, entry: ModelEntry) -> None:
        """Give up models until there is room for one.

        Raises:
            ModelMemoryError: there never will be.
        """
        if self.budget_bytes is None:
            return
        while self._is_wanted(entry):
            self._has_changed.clear()
            self.check_fit(entry)
            missing_bytes = entry.num_bytes + self.used_bytes - self.budget_bytes
            if missing_bytes <= 0:
                return
            going = [other for other in self.entries if other.state == "unloading"]
            patience = self._give_up_others(missing_bytes - sum(other.num_bytes for other in going))
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._has_changed.wait()

    def _give_up_others(self, missing_bytes: int) -> float | None:
        """Begin to give up models that have so much memory, as far as that is their turn; how long the turn
        of the next one lasts, None where nobody's does."""
        loaded = [entry for entry in self.entries if entry.state == "loaded" and not entry.is_pinned]
        loaded.sort(key=_precedence)
        chosen: list[ModelEntry] = []
        for entry in loaded:
            if missing_bytes <= 0:
                break
            left_seconds = self._turn_seconds - entry.seconds_since_load
            if entry.num_uses and left_seconds > 0:
                return left_seconds  # until then the others stay, too
            chosen.append(entry)
            missing_bytes -= entry.num_bytes
        for entry in chosen:
            self._give_up(entry)
        return None

    def _give_up(self, entry: ModelEntry) -> None:
        entry.state = "unloading"
        entry.changing = asyncio.ensure_future(self._unload(entry))

    async def _unload(self, entry: ModelEntry) -> None:
        """Wait for the requests that run, and give its memory back."""
        try:
            await self._empty(entry)
        finally:
            self._set_unloaded(entry)
            entry.num_unloads += 1
            self._has_changed.set()
        logger.info("the model %s is unloaded", entry.name)

    async def _empty(self, entry: ModelEntry) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds):
                await entry.is_idle.wait()
        assert entry.model is not None
        model = [entry.model]
        entry.model = None
        await model[0].close()  # what is left of its requests ends with an error
        await entry.is_idle.wait()
        await self._run(partial(_give_back, model))

    async def _load(self, entry: ModelEntry) -> None:
        assert entry.opener is not None
        assert entry.plan is not None
        entry.state = "loading"
        changing = entry.changing = asyncio.get_running_loop().create_future()
        started = time.monotonic()
        try:
            try:
                entry.set_loaded(await self._open(entry, entry.opener, entry.plan))
            except Exception:
                entry.set_failed()
                raise
            entry.load_seconds += time.monotonic() - started
            logger.info("the model %s is loaded", entry.name)
            if self._is_closed and entry.model is not None:
                await entry.model.close()
            entry.grant()
        finally:
            entry.changing = None
            if entry.model is None:
                self._set_unloaded(entry)
            elif entry.is_forgotten:
                self._give_up(entry)
            changing.set_result(None)

    def _set_unloaded(self, entry: ModelEntry) -> None:
        entry.state, entry.changing = "unloaded", None
        if entry.is_forgotten:
            self.entries.remove(entry)

    async def _open(self, entry: ModelEntry, opener: Opener, plan: ModelPlan) -> ServedModel:
        model = await self._run(partial(opener.open, plan, self._check_going_on))
        try:
            for act in self._on_load:
                await act(model)
            applied = None
            while isinstance(model, AsyncLLM) and (policy := entry.policy) not in (None, applied):
                applied = policy  # it may change meanwhile
                await model.set_policy(policy)
        except BaseException:
            await model.close()
            raise
        return model

    def _note_failure(self, entry: ModelEntry, error: FastServeError) -> FastServeError:
        """What those who wait are told."""
        entry.num_failed_loads += 1
        entry.failure = error
        logger.warning("the model %s could not be loaded: %s", entry.name, error)
        return self._to_answer(entry, error)

    def _to_answer(self, entry: ModelEntry, error: FastServeError, hint: str | None = None) -> FastServeError:
        """What those are told who want a model whose load has failed so."""
        if isinstance(error, ModelMemoryError):
            return error
        if isinstance(error, MemoryLimitError):  # of the machine, whatever the budget says
            return ModelMemoryError(
                f"the model {entry.name!r} could not be loaded: {error.message}",
                hint=self._remedy([e for e in self.entries if e.state == "loaded" and not e.is_pinned]),
            )
        return RequestError(
            f"the model {entry.name!r} could not be loaded: {error.message}",
            status=503,
            code="model_not_loaded",
            param="model",
            hint=hint,
        )

    def _does_not_fit(self, entry: ModelEntry, left_bytes: int, pinned: list[ModelEntry]) -> ModelMemoryError:
        held = f"; pinned are {_list(pinned)}" if pinned else ""
        budget, left = _mib(self.budget_bytes or 0), _mib(max(left_bytes, 0))
        return ModelMemoryError(
            f"the model {entry.name!r} needs {_mib(entry.num_bytes)} of memory; {left} of the {budget} of "
            f"model_memory are available{held}",
            hint=self._remedy([other for other in pinned if other.opener is not None]),
        )

    def _remedy(self, others: list[ModelEntry]) -> str:
        """What makes room for a model."""
        could = f"unload {_list(others)}, or " if others else ""
        more = "free memory" if self.budget_bytes is None else "start with a larger --model-memory"
        return f"{could}{more}, or with a smaller --kv-memory"


def _precedence(entry: ModelEntry) -> tuple[bool, float]:
    """Of models to be given up, the first first."""
    idle_seconds = entry.idle_seconds
    return (False, -idle_seconds) if idle_seconds is not None else (True, -entry.seconds_since_load)


def _give_back(model: list[ServedModel]) -> None:
    """Let go of a model for the last time: unmapping much memory takes a while."""
    model.clear()
    trim_heap()


def _closed_error() -> ClosedError:
    return ClosedError("the server ends", hint="try again when it has started anew")


def _forgotten_error(entry: ModelEntry) -> ModelNotFoundError:
    return ModelNotFoundError(f"the model {entry.name!r} is not served any more", hint="ask for it again")


def _list(entries: list[ModelEntry]) -> str:
    return ", ".join(f"{entry.name} ({_mib(entry.num_bytes)})" for entry in entries)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
