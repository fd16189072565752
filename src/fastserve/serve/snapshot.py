"""What a server looks like at a moment: the document of /admin/status, and of each event of /admin/events."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from typing import Any
from weakref import WeakKeyDictionary

from fastserve._version import __version__
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.snapshot import EngineSnapshot
from fastserve.errors import FastServeError
from fastserve.models.task import Task
from fastserve.serve.latency import LatencySnapshot
from fastserve.serve.model_entry import ModelEntry, ModelState
from fastserve.serve.model_table import ModelTable

_PATIENCE_SECONDS = 0.25  # with engines in a long step


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSnapshot:
    """A model that the server knows."""

    name: str
    aliases: Seq[str] = ()
    version: str | None = None
    state: ModelState
    is_pinned: bool
    memory_bytes: int  # that it takes, or would take; 0: nobody knows yet
    num_requests: int  # that are not finished
    num_waiting: int  # requests that wait for it to be loaded
    num_loads: int
    idle_seconds: float | None  # since its last request ended; None: it is in use, or was never
    task: Task | None  # None: not known before it was loaded
    error: str | None = None  # why it could not be loaded


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """What models may take together, and take."""

    budget_bytes: int | None  # None: there is no limit
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSnapshot:
    """What a tenant has used since the server's start."""

    name: str
    weight: float
    num_running: int  # requests
    requests: int  # that were taken in
    prompt_tokens: int
    completion_tokens: int
    service_seconds: float  # its share of the steps
    joules: float | None  # None: the machine does not report energy
    refused: int  # requests


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Energy:
    watts: float | None  # of the processors, of late; None: the machine does not report them


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSnapshot:
    """Of one server."""

    time: float  # Unix, seconds
    uptime_seconds: float
    version: str
    is_draining: bool
    num_requests: int  # under way
    memory: ProcessMemory
    energy: Energy
    models: Seq[ModelSnapshot]
    model_memory: ModelMemory
    engines: Seq[EngineSnapshot]
    tenants: Seq[TenantSnapshot]
    latencies: Seq[LatencySnapshot]  # of models that have completed something


class Snapshots:
    """Takes snapshots of a server, one for all who watch it at about the same time.

    An engine answers between two steps. Who is in a long one is described as it was before it; it is not
    asked again before it has answered.

    Args:
        engines: those that there are now.
        read_models, read_memory, read_tenants, read_energy, read_latencies: what the rest of the server says
            of itself.
        is_draining: whether it takes no requests.
        read_num_requests: how many are under way.
    """

    def __init__(
        self,
        engines: Callable[[], Iterable[AsyncLLM]],
        *,
        read_models: Callable[[], Seq[ModelSnapshot]],
        read_memory: Callable[[], ModelMemory],
        read_tenants: Callable[[], Seq[TenantSnapshot]] = tuple,
        read_energy: Callable[[], Energy] = lambda: Energy(None),
        read_latencies: Callable[[], Seq[LatencySnapshot]] = tuple,
        is_draining: Callable[[], bool] = lambda: False,
        read_num_requests: Callable[[], int] = lambda: 0,
    ) -> None:
        self._engines = engines
        self._read_models = read_models
        self._read_memory = read_memory
        self._read_tenants = read_tenants
        self._read_energy = read_energy
        self._read_latencies = read_latencies
        self._is_draining = is_draining
        self._read_num_requests = read_num_requests
        self._start_seconds = monotonic()
        self._known: WeakKeyDictionary[AsyncLLM, EngineSnapshot] = WeakKeyDictionary()  # not kept when closed
        self._asked: dict[AsyncLLM, asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()
        self._text = b""
        self._text_seconds = -math.inf
        self._dismissed = asyncio.Event()

    async def take(self) -> ServerSnapshot:
        """The server as it is now."""
        engines = list(self._engines())
        await self._ask(engines)
        return ServerSnapshot(
            time=time(),
            uptime_seconds=monotonic() - self._start_seconds,
            version=__version__,
            is_draining=self._is_draining(),
            num_requests=self._read_num_requests(),
            memory=ProcessMemory(resident_bytes()),
            energy=self._read_energy(),
            models=self._read_models(),
            model_memory=self._read_memory(),
            engines=[self._known[llm] for llm in engines if llm in self._known],
            tenants=self._read_tenants(),
            latencies=self._read_latencies(),
        )

    async def text(self, *, most_age_seconds: float = 0.0) -> bytes:
        """The same as JSON, without line breaks; or what another has got so short a time ago."""
        async with self._lock:
            if monotonic() - self._text_seconds > most_age_seconds:
                self._text = to_text(await self.take())
                self._text_seconds = monotonic()
            return self._text

    def watch(self, interval_seconds: float) -> AsyncIterator[bytes]:
        """A text now, and then at every interval, until `close` or `dismiss`."""
        return self._watch(interval_seconds, self._dismissed)

    async def _watch(self, interval_seconds: float, dismissed: asyncio.Event) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not dismissed.is_set():
            yield await self.text(most_age_seconds=interval_seconds / 2)
            due = max(due + interval_seconds, loop.time())
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await dismissed.wait()

    def dismiss(self) -> None:
        """Let those go who watch by now: what let them in does not any more."""
        self._dismissed.set()
        self._dismissed = asyncio.Event()

    def close(self) -> None:
        """Let all go who watch, also those to come: the server ends."""
        self._dismissed.set()

    async def _ask(self, engines: Seq[AsyncLLM]) -> None:
        for gone in set(self._known.keys()) - set(engines):
            del self._known[gone]
        for llm in engines:
            if llm not in self._asked:
                self._asked[llm] = asyncio.create_task(self._listen(llm))
        if tasks := [self._asked[llm] for llm in engines]:
            await asyncio.wait(tasks, timeout=_PATIENCE_SECONDS)

    async def _listen(self, llm: AsyncLLM) -> None:
        try:
            self._known[llm] = await llm.snapshot()
        except FastServeError:  # it has ended, and is as it was
            pass
        finally:
            del self._asked[llm]


def describe_models(models: ModelTable) -> list[ModelSnapshot]:
    """All models that a server knows."""
    aliases: dict[str, list[str]] = {}
    for name, entry in models.further_names().items():
        aliases.setdefault(entry.name, []).append(name)
    return [_describe(entry, aliases.get(entry.name, ())) for entry in models.entries]


def describe_model(models: ModelTable, entry: ModelEntry) -> ModelSnapshot:
    """One of them."""
    return _describe(entry, [name for name, other in models.further_names().items() if other is entry])


def describe_memory(models: ModelTable) -> ModelMemory:
    return ModelMemory(models.memory.budget_bytes, models.memory.used_bytes)


def _describe(entry: ModelEntry, aliases: Seq[str]) -> ModelSnapshot:
    return ModelSnapshot(
        name=entry.name,
        aliases=aliases,
        version=entry.version,
        state=entry.state,
        is_pinned=entry.is_pinned,
        memory_bytes=entry.num_bytes,
        num_requests=entry.num_requests,
        num_waiting=len(entry.waiting),
        num_loads=entry.num_loads,
        idle_seconds=entry.idle_seconds,
        task=None if entry.plan is None else entry.plan.task,
        error=entry.error,
    )


def resident_bytes() -> int:
    """Memory of this process that is in RAM; where the system does not tell, the most that there was."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def _fields(value: Any) -> Mapping[str, Any]:
    """Of a dataclass with slots. `dataclasses.asdict` copies all that is in it, which takes ten times as
    long."""
    return {name: getattr(value, name) for name in value.__slots__}


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_fields).encode


def to_text(snapshot: ServerSnapshot) -> bytes:
    """JSON, in UTF-8."""
    return _encode(snapshot).encode()
