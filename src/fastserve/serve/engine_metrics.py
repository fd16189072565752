"""What Prometheus reads of the engines: their last status, as metric families."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.statistics import Histogram
from fastserve.engine.status import EngineStatus
from fastserve.errors import FastServeError
from fastserve.serve.model_table import ModelTable

_PATIENCE_SECONDS = 2.0  # with an engine in a long step; then its last status counts

# Name, what it counts, label, and the values of an engine by that label.
_Row = tuple[str, str, str | None, Callable[[EngineStatus], Mapping[str, float]]]

_GAUGES: Seq[_Row] = (
    (
        "sequences",
        "Sequences that are not finished, by where their keys and values are.",
        "residence",
        lambda s: {"nowhere": s.num_waiting, "fast": s.num_resident, "slow": s.num_slow},
    ),
    (
        "unstarted_requests",
        "Requests that wait for their first turn.",
        None,
        lambda s: {"": s.num_unstarted},
    ),
    (
        "kv_blocks_used",
        "Blocks of keys and values that sequences own, by tier.",
        "tier",
        lambda s: {"fast": s.num_blocks - s.num_free_blocks, "slow": s.num_slow_blocks_used},
    ),
    ("kv_blocks", "Blocks of the fast tier.", None, lambda s: {"": s.num_blocks}),
    (
        "kv_blocks_cached",
        "Free blocks of the fast tier that keep a prefix.",
        None,
        lambda s: {"": s.num_cached_blocks},
    ),
)
_COUNTERS: Seq[_Row] = (
    (
        "preemptions",
        "Sequences that were passed over after a turn, by why.",
        "reason",
        lambda s: {reason.replace(" ", "_"): count for reason, count in s.preemptions.items()},
    ),
    ("evictions", "Sequences that lost their blocks.", None, lambda s: {"": s.residency.evictions}),
    (
        "swapped_blocks",
        "Blocks that were moved between the tiers.",
        "direction",
        lambda s: {"out": s.residency.blocks_out, "in": s.residency.blocks_in},
    ),
    ("failed_moves", "Moves between the tiers that failed.", None, lambda s: {"": s.residency.failed_moves}),
    (
        "dropped_tokens",
        "Tokens whose keys and values were dropped, to be computed again.",
        None,
        lambda s: {"": s.residency.dropped_tokens},
    ),
    (
        "prefix_tokens",
        "Tokens that were looked for in the cache of prefixes, and found.",
        "result",
        lambda s: {
            "hit": s.residency.prefix_tokens,
            "miss": s.residency.admitted_tokens - s.residency.prefix_tokens,
        },
    ),
    ("refused_requests", "By a full queue or their deadline.", None, lambda s: {"": s.num_refused}),
    ("expired_requests", "That took or waited too long.", None, lambda s: {"": s.num_expired}),
)
_HISTOGRAMS: Seq[tuple[str, str, str | None, Callable[[EngineStatus], Mapping[str, Histogram]]]] = (
    ("step_sequences", "Sequences of a step.", None, lambda s: {"": s.steps.num_sequences}),
    ("step_tokens", "Rows of a step.", None, lambda s: {"": s.steps.num_tokens}),
    (
        "step_seconds",
        "Of a step, by phase.",
        "phase",
        lambda s: {
            "schedule": s.steps.schedule_seconds,
            "run": s.steps.run_seconds,
            "emit": s.steps.emit_seconds,
        },
    ),
)


class EngineMetrics(Collector):
    """Asks the engines when `refresh` is called, and gives what they said last."""

    def __init__(self, models: ModelTable) -> None:
        self._models = models
        self._statuses: dict[str, EngineStatus] = {}

    async def refresh(self) -> None:
        """Ask all engines; who does not answer in time, or has ended, keeps what it said before. What is not
        loaded any more says nothing."""
        generators = self._models.generators
        names = {llm.name for llm in generators}
        self._statuses = {name: status for name, status in self._statuses.items() if name in names}
        await asyncio.gather(*map(self._ask, generators))

    async def _ask(self, llm: AsyncLLM) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                self._statuses[llm.name] = await llm.status()
        except (TimeoutError, FastServeError):
            pass

    def collect(self) -> Iterable[Metric]:
        yield self._seconds_without_step()
        yield self._queue_lengths()
        for name, text, label, read in _GAUGES:
            gauge = GaugeMetricFamily(f"fastserve_{name}", text, labels=_labels(label))
            self._fill(gauge, read)
            yield gauge
        for name, text, label, read in _COUNTERS:
            counter = CounterMetricFamily(f"fastserve_{name}", text, labels=_labels(label))
            self._fill(counter, read)
            yield counter
        for name, text, label, read_all in _HISTOGRAMS:
            family = HistogramMetricFamily(f"fastserve_{name}", text, labels=_labels(label))
            for model, status in self._statuses.items():
                for value, histogram in read_all(status).items():
                    family.add_metric(
                        [model, value] if label else [model], _to_buckets(histogram), histogram.total
                    )
            yield family

    def _fill(
        self,
        family: GaugeMetricFamily | CounterMetricFamily,
        read: Callable[[EngineStatus], Mapping[str, float]],
    ) -> None:
        for model, status in self._statuses.items():
            for value, number in read(status).items():
                family.add_metric([model, value] if value else [model], number)

    def _seconds_without_step(self) -> Metric:
        family = GaugeMetricFamily(
            "fastserve_seconds_without_step",
            "How long ago an engine has ended a step, or had nothing to do.",
            labels=_labels(None),
        )
        for model in self._models:
            family.add_metric([model.name], model.seconds_without_step)
        return family

    def _queue_lengths(self) -> Metric:
        family = GaugeMetricFamily(
            "fastserve_queue_length",
            "Sequences without keys and values in the fast tier, by class and the policy's level.",
            labels=["model", "priority_class", "level"],
        )
        for model, status in self._statuses.items():
            for (priority_class, level), count in status.queue_lengths.items():
                family.add_metric([model, priority_class, str(level)], count)
        return family


def _labels(label: str | None) -> list[str]:
    return ["model", label] if label else ["model"]


def _to_buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Prometheus counts what is at most a bound."""
    bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
