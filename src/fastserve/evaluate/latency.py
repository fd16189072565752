"""What the requests of one run waited for: latencies, goodput, preemptions, each by a formula stated here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastserve.evaluate.simulate import Outcome
from fastserve.option import check_number
from fastserve.types import Float64Array, Int64Array

WARM_UP_SHARE = 0.05  # of the requests, the first to arrive, which find the machine empty and are not counted
_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a good request keeps: both. By default that of MLPerf Inference for Llama 3.1 8B (2 s, 100 ms).

    Raises:
        OptionError: a bound is not positive.
    """

    ttft_seconds: float = 2.0
    tpot_seconds: float = 0.1

    def __post_init__(self) -> None:
        check_number("ttft_seconds", self.ttft_seconds, 0.0, 1e6, is_low_open=True)
        check_number("tpot_seconds", self.tpot_seconds, 0.0, 1e6, is_low_open=True)


class Timing(Protocol):
    """Of requests in the order of arrival, [n] each: seconds by any clock, NaN of what never happened."""

    @property
    def arrival_seconds(self) -> Float64Array: ...

    @property
    def first_token_seconds(self) -> Float64Array: ...

    @property
    def end_seconds(self) -> Float64Array: ...

    @property
    def longest_gap_seconds(self) -> Float64Array: ...

    @property
    def completion_tokens(self) -> Int64Array: ...


def counted_of(num_requests: int) -> slice:
    """Those that are counted."""
    return slice(int(WARM_UP_SHARE * num_requests), None)


def client_latencies(timing: Timing) -> dict[str, Float64Array]:
    """What each counted request waited for, by figure, [n]; NaN where it has none, or was refused.

    - `ttft_seconds`: first token - arrival.
    - `e2e_seconds`: last token - arrival.
    - `tpot_seconds`: (last token - first token) / (completion tokens - 1); none of a single token.
    - `gap_seconds`: the longest time between two tokens that follow each other; none of a single token.
    - `normalized_seconds`: e2e / completion tokens.
    """
    counted = counted_of(len(timing.arrival_seconds))
    arrival, first = timing.arrival_seconds[counted], timing.first_token_seconds[counted]
    end, tokens = timing.end_seconds[counted], timing.completion_tokens[counted]
    num_gaps = np.where(tokens > 1, tokens - 1.0, np.nan)
    return {
        "ttft_seconds": first - arrival,
        "e2e_seconds": end - arrival,
        "tpot_seconds": (end - first) / num_gaps,
        "gap_seconds": np.where(tokens > 1, timing.longest_gap_seconds[counted], np.nan),
        "normalized_seconds": (end - arrival) / tokens,
    }


def latencies(outcome: Outcome) -> dict[str, Float64Array]:
    """Those of `client_latencies`, and `slowdown`: e2e / what a request takes alone on the machine."""
    by_request = client_latencies(outcome)
    isolated = outcome.isolated_seconds[counted_of(len(outcome.isolated_seconds))]
    return {**by_request, "slowdown": by_request["e2e_seconds"] / isolated}


def describe(by_request: dict[str, Float64Array]) -> dict[str, float]:
    """Mean, p50, p95, p99 and max of what is known of each latency: `ttft_mean_seconds`, ..."""
    figures: dict[str, float] = {}
    for name, values in by_request.items():
        stem, _, unit = name.partition("_")
        ending = f"_{unit}" if unit else ""
        known = values[~np.isnan(values)]
        figures[f"{stem}_mean{ending}"] = float(known.mean()) if len(known) else 0.0
        for percentile in _PERCENTILES:
            value = float(np.percentile(known, percentile)) if len(known) else 0.0
            figures[f"{stem}_p{percentile}{ending}"] = value
        figures[f"{stem}_max{ending}"] = float(known.max()) if len(known) else 0.0
    return figures


def summarize(outcome: Outcome, objective: Objective) -> dict[str, float]:
    """The figures of a run: mean, p50, p95, p99 and max of each latency (`ttft_mean_seconds`, ...), and

    - `goodput_per_second`: requests that keep the objective / seconds in which the counted requests arrive;
      a request of one token has no TPOT to miss. `good_share` is the same over the counted requests.
    - `preemptions_per_request`: how often a request that had a turn was passed over in the next step, mean.
    - `evictions_per_request`: how often a request lost its KV memory, mean.
    - `swapped_blocks_out`, `_in`, `recomputed_tokens`: of the run.
    - `prefix_hit_share`: tokens found in the prefix cache / tokens looked for, of those admitted.
    - `unfinished`, `refused`: of all requests, those without an end, and those that could never fit.
    - `requests_per_second`: finished ones / seconds from the first arrival to the last token.
    - `busy_share`: seconds of steps / the same seconds.
    """
    by_request = latencies(outcome)
    figures = describe(by_request)
    is_good = good_requests(by_request, objective)
    counted_arrivals = outcome.arrival_seconds[-len(is_good) :]
    finished = ~np.isnan(outcome.end_seconds)
    run_seconds = (
        float(outcome.end_seconds[finished].max() - outcome.arrival_seconds[0]) if finished.any() else 0.0
    )
    arrival_seconds = float(counted_arrivals[-1] - counted_arrivals[0])
    figures |= {
        "goodput_per_second": float(is_good.sum()) / max(arrival_seconds, 1e-9),
        "good_share": float(is_good.mean()),
        "preemptions_per_request": float(outcome.preemptions.mean()),
        "evictions_per_request": float(outcome.evictions.mean()),
        "swapped_blocks_out": outcome.swapped_blocks_out,
        "swapped_blocks_in": outcome.swapped_blocks_in,
        "recomputed_tokens": outcome.dropped_tokens,
        "prefix_hit_share": outcome.prefix_tokens / max(outcome.admitted_tokens, 1),
        "num_requests": len(finished),
        "unfinished": int((~finished & ~outcome.is_refused).sum()),
        "refused": int(outcome.is_refused.sum()),
        "num_steps": outcome.num_steps,
        "run_seconds": run_seconds,
        "requests_per_second": float(finished.sum()) / max(run_seconds, 1e-9),
        "busy_share": outcome.busy_seconds / max(run_seconds, 1e-9),
    }
    return figures


def good_requests(by_request: dict[str, Float64Array], objective: Objective) -> np.ndarray:
    """Which of the counted requests keep the objective, [n]; a refused one does not."""
    ttft, tpot = by_request["ttft_seconds"], by_request["tpot_seconds"]
    return (ttft <= objective.ttft_seconds) & ~(tpot > objective.tpot_seconds)
