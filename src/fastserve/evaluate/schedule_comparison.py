"""Policies against the first of them on the same requests: ratios, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastserve.evaluate.schedule_sweep import Run
from fastserve.types import Float64Array, Int64Array

_RESAMPLES = 400
_STRETCHES = 40  # of a run; requests that come together wait together, so they are drawn together

# Figures that are compared, by the latency that they are of.
COMPARED: Mapping[str, tuple[str, Callable[[Float64Array], float]]] = {
    "ttft_mean": ("ttft_seconds", lambda values: float(np.nanmean(values))),
    "ttft_p99": ("ttft_seconds", lambda values: _percentile(values, 0.99)),
    "e2e_mean": ("e2e_seconds", lambda values: float(np.nanmean(values))),
    "e2e_p99": ("e2e_seconds", lambda values: _percentile(values, 0.99)),
    "normalized_mean": ("normalized_seconds", lambda values: float(np.nanmean(values))),
    "gap_p99": ("gap_seconds", lambda values: _percentile(values, 0.99)),
}


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of a policy over that of the first policy, with the bounds of 95 % of its resamples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One policy at one load against the first policy at the same load, over all seeds."""

    policy: str
    load: float
    ratios: Mapping[str, Ratio]

    def to_json(self) -> dict[str, Any]:
        ratios = {
            f"{name}_ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high}
            for name, ratio in self.ratios.items()
        }
        return {"policy": self.policy, "load": self.load, **ratios}


def compare(runs: Seq[Run]) -> list[Comparison]:
    """Every policy but the first, at every load.

    A figure is its mean over the seeds. The interval is a bootstrap over stretches of the arrivals (Künsch,
    Ann. Statist. 17, 1989): within each seed, a fortieth of the requests that follow each other are drawn
    together, the same ones for both policies.
    """
    policies = list(dict.fromkeys(run.policy for run in runs))
    comparisons = []
    for load in dict.fromkeys(run.load for run in runs):
        by_policy = {
            policy: [run for run in runs if run.policy == policy and run.load == load] for policy in policies
        }
        first, *others = policies
        for policy in others:
            ratios = {name: _ratio(by_policy[policy], by_policy[first], name) for name in COMPARED}
            comparisons.append(Comparison(policy, load, ratios))
    return comparisons


def _ratio(ours: Seq[Run], theirs: Seq[Run], name: str) -> Ratio:
    latency, figure = COMPARED[name]
    one = [run.by_request[latency] for run in ours]
    other = [run.by_request[latency] for run in theirs]
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(_RESAMPLES):
        drawn = [_draw_stretches(rng, len(values)) for values in one]
        resampled.append(
            _mean_over([v[i] for v, i in zip(one, drawn, strict=True)], figure)
            / _mean_over([v[i] for v, i in zip(other, drawn, strict=True)], figure)
        )
    low, high = np.percentile(resampled, [2.5, 97.5]).tolist()
    return Ratio(_mean_over(one, figure) / _mean_over(other, figure), low, high)


def _mean_over(seeds: Seq[Float64Array], figure: Callable[[Float64Array], float]) -> float:
    return max(float(np.mean([figure(values) for values in seeds])), 1e-12)


def _draw_stretches(rng: np.random.Generator, n: int) -> Int64Array:
    """Indices of about n requests, in stretches that follow each other."""
    length = max(n // _STRETCHES, 1)
    starts = rng.integers(0, n - length + 1, size=-(-n // length))
    return (starts[:, None] + np.arange(length)).ravel()


def _percentile(values: Float64Array, share: float) -> float:
    """The value of that rank, without the interpolation and the sorting of numpy's."""
    known = values[~np.isnan(values)]
    rank = min(int(share * len(known)), len(known) - 1)
    return float(np.partition(known, rank)[rank])
