"""What tenants have had since the server's start: for bills, as metrics and as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(slots=True, eq=False)
class TenantUsage:
    """Of one tenant. Tokens of completions that were given up count, as they have been computed.

    Attributes:
        requests: that the model was asked to work for, and that were not refused.
        service_seconds: of steps, each shared alike by the sequences, or texts to embed, that it ran.
        joules: of what the machine consumed, by seconds of service.
        refused: requests, by the limit that they were over.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    service_seconds: float = 0.0
    joules: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)

    def begin(self, prompt_tokens: int) -> None:
        """A request has been taken."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens

    def serve(self, num_tokens: int, seconds: float) -> None:
        """Tokens of completions, and seconds of service, have been given."""
        self.completion_tokens += num_tokens
        self.service_seconds += seconds


class Tenant(Protocol):
    """What is told of a tenant."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def num_running(self) -> int: ...
    @property
    def usage(self) -> TenantUsage: ...


def describe_usage(tenant: Tenant, *, has_energy: bool) -> dict[str, Any]:
    """A row of the bill. Without energy, what it consumed is not known."""
    usage = tenant.usage
    return {
        "name": tenant.name,
        "weight": tenant.weight,
        "num_running": tenant.num_running,
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "service_seconds": round(usage.service_seconds, 6),
        "joules": round(usage.joules, 3) if has_energy else None,
        "refused": usage.refused.total(),
    }


def write_csv(tenants: Iterable[Tenant], *, has_energy: bool) -> str:
    """The rows of all tenants, under a line of their fields' names; what is not known is empty."""
    rows = [describe_usage(tenant, has_energy=has_energy) for tenant in tenants]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_COUNTERS: Seq[tuple[str, str, str | None, Callable[[TenantUsage], Mapping[str, float]]]] = (
    ("requests", "Requests that the model was asked to work for.", None, lambda u: {"": u.requests}),
    ("prompt_tokens", "Tokens of prompts, and of texts to embed.", None, lambda u: {"": u.prompt_tokens}),
    (
        "completion_tokens",
        "Tokens of completions, also of those that were given up.",
        None,
        lambda u: {"": u.completion_tokens},
    ),
    (
        "service_seconds",
        "Seconds of steps, each shared alike by the sequences that it ran.",
        None,
        lambda u: {"": u.service_seconds},
    ),
    (
        "refused_requests",
        "Requests that were over a limit of their tenant.",
        "limit",
        lambda u: u.refused,
    ),
)


class TenantMetrics(Collector):
    """What Prometheus reads of tenants.

    Args:
        has_energy: whether the machine tells what it consumes.
    """

    def __init__(self, tenants: Iterable[Tenant], *, has_energy: bool) -> None:
        self._tenants = list(tenants)
        self._has_energy = has_energy

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily(
            "fastserve_tenant_requests_under_way", "Requests that run or wait.", labels=["tenant"]
        )
        for tenant in self._tenants:
            running.add_metric([tenant.name], tenant.num_running)
        yield running
        for name, text, label, read in _COUNTERS:
            family = CounterMetricFamily(
                f"fastserve_tenant_{name}", text, labels=["tenant", label] if label else ["tenant"]
            )
            for tenant in self._tenants:
                for value, number in read(tenant.usage).items():
                    family.add_metric([tenant.name, value] if label else [tenant.name], number)
            yield family
        if self._has_energy:
            family = CounterMetricFamily(
                "fastserve_tenant_joules",
                "What the machine consumed while requests ran, by seconds of service.",
                labels=["tenant"],
            )
            for tenant in self._tenants:
                family.add_metric([tenant.name], tenant.usage.joules)
            yield family
