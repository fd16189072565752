"""What a run against a server comes to: latencies as clients had them, throughput, failures by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from fastserve.evaluate.exchange import Exchange
from fastserve.evaluate.latency import (
    Objective,
    client_latencies,
    counted_of,
    describe,
    good_requests,
)
from fastserve.evaluate.load_run import LoadRun
from fastserve.types import Float64Array, Int64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTiming:
    """Of exchanges in the order of arrival, [n] each; seconds since the first arrival, NaN of what failed."""

    arrival_seconds: Float64Array
    first_token_seconds: Float64Array
    end_seconds: Float64Array
    longest_gap_seconds: Float64Array
    completion_tokens: Int64Array

    @classmethod
    def from_exchanges(cls, exchanges: Seq[Exchange]) -> LoadTiming:
        start = exchanges[0].arrival_seconds if exchanges else 0.0
        return cls(
            arrival_seconds=np.array([e.arrival_seconds - start for e in exchanges], np.float64),
            first_token_seconds=_since(start, [_of_whole(e, e.first_token_seconds) for e in exchanges]),
            end_seconds=_since(start, [e.end_seconds for e in exchanges]),
            longest_gap_seconds=np.array([max(e.gaps, default=0.0) for e in exchanges], np.float64),
            completion_tokens=np.array([max(e.completion_tokens or 1, 1) for e in exchanges], np.int64),
        )


def summarize_load(run: LoadRun, objective: Objective) -> dict[str, float]:
    """The figures of a run. The first to arrive (`latency.WARM_UP_SHARE`) are left out of latencies.

    - mean, p50, p95, p99 and max of `ttft`, `tpot`, `gap` (a request's longest), `e2e` and `normalized`, as
      `latency.client_latencies` defines them, of the counted requests that were answered whole; and of
      `itl_seconds`: between pieces of text that follow each other, of all those requests together.
    - `goodput_per_second`, `good_share`: of counted requests that keep the objective, as in
      `latency.summarize`; one that failed does not keep it.
    - `requests_per_second`, `output_tokens_per_second`, `prompt_tokens_per_second`: of requests that were
      answered whole / seconds from the first arrival to the last token.
    - `num_requests`, `num_finished`, `num_failed`: of all that were sent. `short_completions`: finished ones
      of fewer tokens than planned.
    - `prompt_tokens_mean`, `planned_prompt_tokens_mean`, and the same of completions: of finished ones.
    - `tokens_per_text`: tokens of a piece of text; above 1, several of them come at once.
    - `lateness_p99_seconds`, `lateness_max_seconds`: of the client, from when a request was to be sent.
    - `client_cpu_seconds`, `client_cpu_share`: of one core, over the run.
    """
    exchanges = run.exchanges
    timing = LoadTiming.from_exchanges(exchanges)
    by_request = client_latencies(timing)
    counted = exchanges[counted_of(len(exchanges))]
    whole = [e for e in exchanges if e.end_seconds is not None]
    itl = np.array([gap for e in counted if e.end_seconds is not None for gap in e.gaps], np.float64)
    is_good = good_requests(by_request, objective)
    arrivals = timing.arrival_seconds[counted_of(len(exchanges))]
    arrival_seconds = max(float(arrivals[-1] - arrivals[0]), 1e-9) if len(arrivals) else 1e-9
    answered_seconds = max((e.end_seconds or 0.0 for e in whole), default=0.0) - run.start_seconds
    answered_seconds = max(answered_seconds, 1e-9)
    num_tokens = sum(e.completion_tokens or 0 for e in whole)
    num_texts = sum(len(e.text_seconds) for e in whole)
    lateness = [e.sent_seconds - e.arrival_seconds for e in exchanges if e.sent_seconds is not None] or [0.0]
    prompt_tokens = [e.prompt_tokens or 0 for e in whole]
    run_seconds = max(run.end_seconds - run.start_seconds, 1e-9)
    return describe({**by_request, "itl_seconds": itl}) | {
        "goodput_per_second": float(is_good.sum()) / arrival_seconds,
        "good_share": float(is_good.mean()) if len(is_good) else 0.0,
        "requests_per_second": len(whole) / answered_seconds,
        "output_tokens_per_second": num_tokens / answered_seconds,
        "prompt_tokens_per_second": sum(prompt_tokens) / answered_seconds,
        "num_requests": len(exchanges),
        "num_finished": len(whole),
        "num_failed": len(exchanges) - len(whole),
        "short_completions": sum(
            (e.completion_tokens or 0) < e.planned.arrival.completion_tokens for e in whole
        ),
        "prompt_tokens_mean": _mean(prompt_tokens),
        "planned_prompt_tokens_mean": _mean([e.planned.arrival.prompt_tokens for e in whole]),
        "completion_tokens_mean": num_tokens / max(len(whole), 1),
        "planned_completion_tokens_mean": _mean([e.planned.arrival.completion_tokens for e in whole]),
        "tokens_per_text": num_tokens / max(num_texts, 1),
        "lateness_p99_seconds": float(np.percentile(lateness, 99)),
        "lateness_max_seconds": max(lateness),
        "run_seconds": run_seconds,
        "client_cpu_seconds": run.client_cpu_seconds,
        "client_cpu_share": run.client_cpu_seconds / run_seconds,
    }


def count_failures(exchanges: Seq[Exchange]) -> dict[str, int]:
    """How often each kind of failure was met, the most frequent first."""
    return dict(Counter(e.failure for e in exchanges if e.failure is not None).most_common())


def failure_messages(exchanges: Seq[Exchange]) -> dict[str, str]:
    """What was said with the first failure of each kind."""
    messages: dict[str, str] = {}
    for exchange in exchanges:
        if exchange.failure is not None and exchange.message:
            messages.setdefault(exchange.failure, exchange.message)
    return messages


def _of_whole(exchange: Exchange, value: float | None) -> float | None:
    return value if exchange.end_seconds is not None else None


def _since(start: float, values: Seq[float | None]) -> Float64Array:
    return np.array([np.nan if value is None else value - start for value in values], np.float64)


def _mean(values: Seq[int]) -> float:
    return sum(values) / max(len(values), 1)
