"""What all routes share: the models, the options, the tenants, the metrics, what is known of the server."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Self

from starlette.requests import Request
from starlette.responses import Response

from fastserve.engine.async_llm import AsyncLLM
from fastserve.serve.drain import Drain
from fastserve.serve.energy import EnergyMeter
from fastserve.serve.engine_metrics import EngineMetrics
from fastserve.serve.generation import Generation, GenerationRequest, generate
from fastserve.serve.latency import read_latencies
from fastserve.serve.metrics import Metrics
from fastserve.serve.model_table import ModelTable
from fastserve.serve.options import ServeOptions
from fastserve.serve.record import RequestRecord
from fastserve.serve.security import account_of
from fastserve.serve.snapshot import Energy, ModelMemory, Snapshots, TenantSnapshot, describe_models
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
        drain = Drain()
        snapshots = Snapshots(
            lambda: models.generators,
            read_models=lambda: describe_models(models),
            read_memory=lambda: ModelMemory(None, sum(m.memory_bytes for m in describe_models(models))),
            read_tenants=lambda: [
                TenantSnapshot(**describe_usage(tenant, has_energy=energy.is_known)) for tenant in tenants
            ],
            read_energy=lambda: Energy(energy.watts),
            read_latencies=lambda: read_latencies(metrics),
            is_draining=lambda: drain.is_draining,
        )
        return cls(models, options, metrics, engine_metrics, tenants, energy, drain, snapshots)

    def generate(
        self, llm: AsyncLLM, asked: GenerationRequest, request: Request
    ) -> AbstractAsyncContextManager[Generation]:
        """Submit what an HTTP request asks for; see `fastserve.serve.generation.generate`."""
        return generate(
            llm,
            asked,
            endpoint=request.scope["route"].path,
            options=self.options,
            metrics=self.metrics,
            record=RequestRecord.of(request.scope),
            tenants=self.tenants,
            tenant=account_of(request.scope),
        )

    async def answer(
        self, llm: AsyncLLM, asked: GenerationRequest, format_: Format, request: Request, *, is_streamed: bool
    ) -> Response:
        """The answer to a request that generates text; see `fastserve.serve.stream.answer`."""
        context = self.generate(llm, asked, request)
        return await answer(context, format_, request, self.options, is_streamed=is_streamed)
