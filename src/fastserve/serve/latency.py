"""How long requests have taken, as those read it who draw it: two of the histograms of /metrics, by model."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from prometheus_client import Histogram

from fastserve.serve.metrics import Metrics


@dataclass(frozen=True, slots=True)
class LatencyCounts:
    """A histogram: how many values lie above a bound and at most at the next. There is one count more than
    bounds, of what lies above the last."""

    bounds: Seq[float]
    counts: Seq[int]


@dataclass(frozen=True, slots=True)
class LatencySnapshot:
    """Of a model's completions that have ended since the server's start."""

    model: str
    time_to_first_token_seconds: LatencyCounts
    time_per_output_token_seconds: LatencyCounts  # mean of a completion, after its first token


def read_latencies(metrics: Metrics) -> list[LatencySnapshot]:
    """Of all models that have completed something."""
    first = _read(metrics.time_to_first_token_seconds)
    each = _read(metrics.time_per_output_token_seconds)
    return [LatencySnapshot(model, first[model], each[model]) for model in first if model in each]


def _read(histogram: Histogram) -> dict[str, LatencyCounts]:
    """By model. Prometheus counts what is at most a bound, of which the last is infinite."""
    cumulative: dict[str, list[tuple[float, int]]] = {}
    for sample in next(iter(histogram.collect())).samples:
        if sample.name.endswith("_bucket"):
            bucket = float(sample.labels["le"]), int(sample.value)
            cumulative.setdefault(sample.labels["model"], []).append(bucket)
    return {
        model: LatencyCounts(
            [bound for bound, _ in buckets[:-1]],
            [count - below for (_, count), (_, below) in zip(buckets, [(0.0, 0), *buckets], strict=False)],
        )
        for model, buckets in cumulative.items()
    }
