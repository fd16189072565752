"""One model that a server knows: whether it is loaded, who uses it, who waits for it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path
from typing import Literal, Protocol

from fastserve.checkpoint.checked_tensors import Check
from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.loaded_model import LoadedModel, ModelPlan
from fastserve.errors import FastServeError
from fastserve.hub.name_table import split_version

ServedModel = AsyncLLM | AsyncEncoder
ModelState = Literal["unloaded", "loading", "loaded", "unloading"]


class Opener(Protocol):
    """Opens one model, as often as it is asked to. Both methods take long, and are for threads."""

    def plan(self) -> ModelPlan:
        """What opening it comes to. Raises as `plan_model`."""
        ...

    def open(self, plan: ModelPlan, check: Check | None = None) -> ServedModel:
        """Load it, in the memory of a plan. Arguments and errors as of `load_model`."""
        ...


class ModelEntry:
    """A model by one name. It is changed on the event loop alone.

    Args:
        opener: None: it is loaded already, by `model`, and stays.
        adapters: folders of what is loaded beside it, by name. Its opener reads them each time.
        version: of `NAME@VERSION`.
    """

    def __init__(
        self,
        name: str,
        *,
        opener: Opener | None = None,
        model: ServedModel | None = None,
        is_pinned: bool = False,
        adapters: dict[str, Path] | None = None,
    ) -> None:
        assert (opener is None) == (model is not None)
        self.name = name
        self.adapters: dict[str, Path] = {} if adapters is None else adapters
        self.base, self.version = split_version(name)
        self.opener = opener
        self.is_pinned = is_pinned or opener is None
        self.is_forgotten = False  # it is not served any more: it goes, and does not come again
        self.plan: ModelPlan | None = None
        self.state: ModelState = "unloaded"
        self.model: ServedModel | None = None
        self.changing: asyncio.Future[None] | None = None  # while it is loading or unloading
        self.failure: FastServeError | None = None  # of the last load, if that failed
        self.policy: str | None = None  # that it goes on by when it is loaded; None: that of its options
        self.num_uses = 0  # by leases, and by what goes on after them
        self.waiting: deque[Lease] = deque()
        self.is_idle = asyncio.Event()
        self.is_idle.set()
        self.num_loads = self.num_unloads = self.num_failed_loads = 0
        self.load_seconds = 0.0  # of all loads
        self._num_failures = 0  # of loads, since one went well
        self._failed_seconds = 0.0
        self._loaded_seconds = self._used_seconds = time.monotonic()
        if model is not None:
            self.set_loaded(model)

    @classmethod
    def of(cls, model: ServedModel) -> ModelEntry:
        """Of a model that is loaded, and stays."""
        adapters = {adapter.name: adapter.path for adapter in model.adapters}
        return cls(model.name, model=model, adapters=adapters)

    @property
    def error(self) -> str | None:
        """Why its last load failed, if it did."""
        return None if self.failure is None else self.failure.message

    @property
    def num_requests(self) -> int:
        """That it has not finished."""
        return 0 if self.model is None else self.model.num_unfinished

    @property
    def is_open(self) -> bool:
        """Whether requests are let in."""
        return self.state == "loaded"

    @property
    def num_bytes(self) -> int:
        """Memory that it takes when it is loaded; 0 as long as nobody knows."""
        return 0 if self.plan is None else self.plan.total_bytes

    @property
    def seconds_since_load(self) -> float:
        return time.monotonic() - self._loaded_seconds

    @property
    def idle_seconds(self) -> float | None:
        """How long ago its last request has ended, or it was loaded; None while it is used, or not loaded."""
        if self.num_uses or self.state != "loaded":
            return None
        return time.monotonic() - self._used_seconds

    def seconds_until_retry(self, first: float, most: float) -> float:
        """How long it is left alone from now on, as its load has failed: after one failure for `first`
        seconds, after each that follows for twice as long."""
        if not self._num_failures:
            return 0.0
        pause = min(first * 2.0 ** min(self._num_failures - 1, 30), most)
        return max(0.0, self._failed_seconds + pause - time.monotonic())

    def set_failed(self) -> None:
        self._num_failures += 1
        self._failed_seconds = time.monotonic()

    def set_loaded(self, model: ServedModel) -> None:
        self.model = model
        self.plan = plan_of(model.model)
        self.state, self.failure = "loaded", None
        self._num_failures = 0
        self.num_loads += 1
        self._loaded_seconds = self._used_seconds = time.monotonic()

    def hold(self) -> None:
        """Something begins to use it that `let_go` ends."""
        self.num_uses += 1
        self.is_idle.clear()

    def let_go(self) -> None:
        self.num_uses -= 1
        if not self.num_uses:
            self._used_seconds = time.monotonic()
            self.is_idle.set()

    def grant(self) -> None:
        """Let in all who wait."""
        while self.waiting:
            self.waiting.popleft().grant()

    def fail(self, error: FastServeError) -> None:
        """Refuse all who wait."""
        while self.waiting:
            self.waiting.popleft().fail(error)


class Lease:
    """A request's use of a model: waited for, then held until it is closed."""

    def __init__(self, entry: ModelEntry) -> None:
        self.entry = entry
        self._model: ServedModel | None = None
        self._future: asyncio.Future[ServedModel] = asyncio.get_running_loop().create_future()

    @property
    def model(self) -> ServedModel | None:
        """None as long as it is waited for."""
        return self._model

    def grant(self) -> None:
        assert self.entry.model is not None
        self._model = self.entry.model
        self.entry.hold()
        if not self._future.done():
            self._future.set_result(self._model)

    def fail(self, error: FastServeError) -> None:
        if not self._future.done():
            self._future.set_exception(error)

    async def wait(self) -> ServedModel:
        """The model, once it is there. Raises what its load fails with."""
        return await asyncio.shield(self._future)

    def close(self) -> None:
        """Give it back, or wait no longer. Closing again does nothing."""
        if self._model is not None:
            self._model = None
            self.entry.let_go()
        elif self in self.entry.waiting:
            self.entry.waiting.remove(self)
        if self._future.done() and not self._future.cancelled():
            self._future.exception()  # nobody may have asked
        self._future.cancel()


def plan_of(model: LoadedModel) -> ModelPlan:
    """What a loaded model has come to, as `plan_model` tells it beforehand."""
    draft_bytes = 0 if model.draft is None else model.draft.footprint.total_bytes
    return ModelPlan(
        settings=model.settings,
        context_length=model.context_length,
        kv_bytes=model.footprint.kv_bytes,
        total_bytes=model.footprint.total_bytes + draft_bytes,
    )
