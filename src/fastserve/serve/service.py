"""What all routes share: the models, the options, the tenants, the metrics, what is known of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

from starlette.requests import Request
from starlette.responses import Response

from fastserve.config import MOST_TIMEOUT_MS
from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.loaded_model import check_task
from fastserve.errors import DeadlineError, RequestError
from fastserve.models.task import Task
from fastserve.option import check_number
from fastserve.serve.connection import run_while_connected
from fastserve.serve.drain import Drain
from fastserve.serve.energy import EnergyMeter
from fastserve.serve.engine_metrics import EngineMetrics
from fastserve.serve.generation import Generation, GenerationRequest, generate
from fastserve.serve.latency import read_latencies
from fastserve.serve.metrics import Metrics
from fastserve.serve.model_entry import Lease, ModelEntry, ServedModel
from fastserve.serve.model_metrics import ModelMetrics
from fastserve.serve.model_table import ModelTable
from fastserve.serve.options import ServeOptions
from fastserve.serve.record import RequestRecord
from fastserve.serve.security import account_of
from fastserve.serve.snapshot import Energy, Snapshots, TenantSnapshot, describe_memory, describe_models
from fastserve.serve.stream import Format, answer
from fastserve.serve.tenant_table import TenantTable
from fastserve.serve.usage import describe_usage


@dataclass(frozen=True, slots=True)
class Service:
    """Of one server."""

    models: ModelTable
    options: ServeOptions
    metrics: Metrics
    engine_metrics: EngineMetrics
    tenants: TenantTable
    energy: EnergyMeter
    drain: Drain
    snapshots: Snapshots

    @classmethod
    def of(cls, models: ModelTable, options: ServeOptions, tenants: TenantTable, energy: EnergyMeter) -> Self:
        metrics, engine_metrics = Metrics(), EngineMetrics(models)
        metrics.registry.register(engine_metrics)
        metrics.registry.register(ModelMetrics(models))
        drain = Drain()
        snapshots = Snapshots(
            lambda: models.generators,
            read_models=lambda: describe_models(models),
            read_memory=lambda: describe_memory(models),
            read_tenants=lambda: [
                TenantSnapshot(**describe_usage(tenant, has_energy=energy.is_known)) for tenant in tenants
            ],
            read_energy=lambda: Energy(energy.watts),
            read_latencies=lambda: read_latencies(metrics),
            is_draining=lambda: drain.is_draining,
            read_num_requests=lambda: _num_under_way(drain, models),
        )
        return cls(models, options, metrics, engine_metrics, tenants, energy, drain, snapshots)

    @property
    def num_under_way(self) -> int:
        """Requests whose answers have not gone out whole; without any, those that engines have not let go of
        yet."""
        return _num_under_way(self.drain, self.models)

    @asynccontextmanager
    async def generator(
        self, name: str, request: Request, *, timeout_ms: float | None = None
    ) -> AsyncIterator[AsyncLLM]:
        """A model that generates text, loaded where it must be, and kept meanwhile.

        Args:
            timeout_ms: of the request.

        Raises:
            ModelNotFoundError, UnsupportedError: there is none of that name, or it is an encoder.
            ModelMemoryError, RequestError: it cannot be loaded, or was not in time.
            QueueFullError, DeadlineError: as many wait for it as may, or the request's time is over.
        """
        async with self._use(name, request, "generate", timeout_ms) as model:
            assert isinstance(model, AsyncLLM)
            yield model

    @asynccontextmanager
    async def encoder(self, name: str, request: Request, task: Task = "embed") -> AsyncIterator[AsyncEncoder]:
        """An encoder for a task. As `generator`."""
        async with self._use(name, request, task, None) as model:
            assert isinstance(model, AsyncEncoder)
            yield model

    @asynccontextmanager
    async def model(self, name: str, request: Request) -> AsyncIterator[ServedModel]:
        """A model of any kind. As `generator`."""
        async with self._use(name, request, None, None) as model:
            yield model

    @asynccontextmanager
    async def generate(
        self, llm: AsyncLLM, asked: GenerationRequest, request: Request
    ) -> AsyncIterator[Generation]:
        """Submit what an HTTP request asks for; see `fastserve.serve.generation.generate`. The model is kept
        meanwhile."""
        generation = generate(
            llm,
            asked,
            endpoint=request.scope["route"].path,
            options=self.options,
            metrics=self.metrics,
            record=RequestRecord.of(request.scope),
            tenants=self.tenants,
            tenant=account_of(request.scope),
        )
        memory = self.models.memory
        with memory.holding(memory.entry_of(llm)):
            async with generation as running:
                yield running

    async def answer(
        self, llm: AsyncLLM, asked: GenerationRequest, format_: Format, request: Request, *, is_streamed: bool
    ) -> Response:
        """The answer to a request that generates text; see `fastserve.serve.stream.answer`."""
        context = self.generate(llm, asked, request)
        return await answer(context, format_, request, self.options, is_streamed=is_streamed)

    @asynccontextmanager
    async def _use(
        self, name: str, request: Request, task: Task | None, timeout_ms: float | None
    ) -> AsyncIterator[ServedModel]:
        entry, adapter = self.models.find_with_adapter(name)
        _check_task(entry, task, name)
        if adapter is not None:
            record = RequestRecord.of(request.scope)
            record.adapter = record.details["adapter"] = adapter
        lease = self.models.memory.enter(entry)
        try:
            if lease.model is None:
                with account_of(request.scope).waiting():
                    waited = self._wait(lease, name, RequestRecord.of(request.scope), timeout_ms)
                    await run_while_connected(request.receive, waited)
                _check_task(entry, task, name)
            assert lease.model is not None
            yield lease.model
        finally:
            self.models.memory.leave(lease)

    async def _wait(
        self, lease: Lease, name: str, record: RequestRecord, timeout_ms: float | None
    ) -> ServedModel:
        patience = self.options.model_wait_seconds
        left_seconds = patience
        if timeout_ms is not None:
            check_number("timeout_ms", timeout_ms, 0, MOST_TIMEOUT_MS, is_low_open=True)
            left_seconds = timeout_ms / 1000 - (time.perf_counter() - record.arrival_seconds)
        try:
            async with asyncio.timeout(min(patience, left_seconds)):
                return await lease.wait()
        except TimeoutError:
            if left_seconds < patience:
                raise DeadlineError(
                    f"the model {name!r} was not loaded within timeout_ms={timeout_ms:g}",
                    hint="give it more time, or try again when the model is loaded",
                ) from None
            raise RequestError(
                f"the model {name!r} was not loaded within {patience:g} seconds: others have had the memory",
                status=503,
                code="model_not_loaded",
                param="model",
                hint="try again later",
            ) from None


def _num_under_way(drain: Drain, models: ModelTable) -> int:
    return drain.num_under_way or sum(entry.num_requests for entry in models.memory.entries)


def _check_task(entry: ModelEntry, task: Task | None, name: str) -> None:
    """As `check_task`, as soon as anybody knows."""
    if task is not None and entry.plan is not None:
        check_task(task, entry.plan.settings, name)
