"""Where the requests of a run come from: lengths of some distribution or trace, at any mean rate."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gamma
from typing import Protocol

import numpy as np

from fastserve.evaluate.arrival import Arrival, gamma_gaps
from fastserve.evaluate.trace import RateTrace, RateWindow, TimedTrace
from fastserve.option import INT32_MAX
from fastserve.types import Float64Array, Int64Array

Lengths = tuple[Int64Array, Int64Array]
"""Prompt and completion tokens of some requests, [n] each."""


class Traffic(Protocol):
    """Makes the requests of one run."""

    @property
    def name(self) -> str: ...

    @property
    def num_requests(self) -> int | None:
        """Of the trace that it is; None where there are as many as one likes."""
        ...

    def arrivals(self, num_requests: int, seed: int) -> list[Arrival]:
        """So many requests in the order of arrival, at whatever rate; the same for the same seed."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """Requests of one kind within a mix: their share, and how lengths of n of them are drawn."""

    tenant: str
    share: float
    draw: Callable[[np.random.Generator, int], Lengths]


@dataclass(frozen=True, slots=True)
class Mix:
    """Independent requests of several kinds, arriving by a renewal process with gamma distributed gaps."""

    name: str
    parts: tuple[Part, ...]
    cv: float = 1.0  # of the gaps

    @property
    def num_requests(self) -> None:
        return None

    def arrivals(self, num_requests: int, seed: int) -> list[Arrival]:
        rng = np.random.default_rng([seed, 1])
        times = np.cumsum(gamma_gaps(rng, num_requests, rate=1.0, cv=self.cv))
        kinds = rng.choice(len(self.parts), num_requests, p=[part.share for part in self.parts])
        prompts = np.zeros(num_requests, np.int64)
        completions = np.zeros(num_requests, np.int64)
        for kind, part in enumerate(self.parts):
            chosen = kinds == kind
            prompts[chosen], completions[chosen] = part.draw(rng, int(chosen.sum()))
        return make_arrivals(times, prompts, completions, [self.parts[kind].tenant for kind in kinds])


@dataclass(frozen=True, slots=True)
class Replay:
    """The requests of a trace with their times; from a seed other than 0, starting within, wrapping round."""

    name: str
    trace: TimedTrace

    @property
    def num_requests(self) -> int:
        return len(self.trace.arrivals)

    def arrivals(self, num_requests: int, seed: int) -> list[Arrival]:
        trace = self.trace.arrivals
        start = int(np.random.default_rng([seed, 2]).integers(len(trace))) if seed else 0
        period = trace[-1].arrival_seconds * len(trace) / (len(trace) - 1)  # a mean gap after the last one
        arrivals = []
        for index in range(start, start + num_requests):
            laps, place = divmod(index, len(trace))
            seconds = trace[place].arrival_seconds + laps * period - trace[start].arrival_seconds
            arrivals.append(replace(trace[place], arrival_seconds=seconds))
        return arrivals


@dataclass(frozen=True, slots=True)
class Clients:
    """Clients whose rates change, each a renewal process within a window; their lengths are drawn.

    A window's gaps have the shape that was fitted, and the mean that its rate says.
    """

    name: str
    trace: RateTrace
    draw: Callable[[np.random.Generator, int], Lengths]

    @property
    def num_requests(self) -> None:
        return None

    def arrivals(self, num_requests: int, seed: int) -> list[Arrival]:
        rng = np.random.default_rng([seed, 3])
        requests: list[tuple[float, str]] = []
        starts = sorted({w.start_seconds for _, windows in self.trace.clients for w in windows})
        ends = [*starts[1:], 2 * starts[-1] - starts[-2] if len(starts) > 1 else starts[0] + 600.0]
        laps = 0
        while len(requests) < num_requests:  # the last window is followed by the first again
            for start, end in zip(starts, ends, strict=True):
                offset = laps * (ends[-1] - starts[0])
                requests += sorted(
                    (offset + seconds, client)
                    for client, windows in self.trace.clients
                    for window in windows
                    if window.start_seconds == start
                    for seconds in _window_times(rng, window, end)
                )
                if len(requests) >= num_requests:
                    break
            laps += 1
        del requests[num_requests:]
        times = np.array([seconds for seconds, _ in requests])
        prompts, completions = self.draw(rng, num_requests)
        return make_arrivals(times - times[0], prompts, completions, [client for _, client in requests])


def _window_times(rng: np.random.Generator, window: RateWindow, end: float) -> list[float]:
    """Arrivals from a window's start to its end."""
    if not window.rate:
        return []
    span = end - window.start_seconds
    times: list[float] = []
    last = 0.0
    while last < span:
        num_gaps = int(window.rate * span * 1.5) + 16
        if window.family == "Gamma":
            gaps = rng.gamma(window.shape, 1 / window.shape, num_gaps)
        else:
            gaps = rng.weibull(window.shape, num_gaps) / gamma(1 + 1 / window.shape)
        chunk = last + np.cumsum(gaps / window.rate)
        last = float(chunk[-1])
        times += chunk.tolist()
    return [window.start_seconds + seconds for seconds in times if seconds < span]


def make_arrivals(
    times: Float64Array, prompts: Int64Array, completions: Int64Array, tenants: Seq[str]
) -> list[Arrival]:
    columns = zip(times.tolist(), prompts.tolist(), completions.tolist(), tenants, strict=True)
    return [
        Arrival(arrival_seconds=time, prompt_tokens=prompt, completion_tokens=completion, tenant=tenant)
        for time, prompt, completion, tenant in columns
    ]


def scale_to_rate(arrivals: Seq[Arrival], rate: float) -> list[Arrival]:
    """The same requests, arriving at a mean of `rate` a second.

    >>> mix = [Arrival(arrival_seconds=i, prompt_tokens=1, completion_tokens=1) for i in range(3)]
    >>> [arrival.arrival_seconds for arrival in scale_to_rate(mix, 2.0)]
    [0.0, 0.5, 1.0]
    """
    span = arrivals[-1].arrival_seconds - arrivals[0].arrival_seconds
    factor = (len(arrivals) - 1) / (rate * span)
    start = arrivals[0].arrival_seconds
    assert all(one.arrival_seconds <= other.arrival_seconds for one, other in pairwise(arrivals))
    return [replace(a, arrival_seconds=(a.arrival_seconds - start) * factor) for a in arrivals]


def scale_lengths(
    arrivals: Seq[Arrival],
    scale: float,
    *,
    max_prompt_tokens: int = INT32_MAX,
    max_completion_tokens: int = INT32_MAX,
) -> list[Arrival]:
    """The same requests with shorter or longer prompts and completions, up to the most of each.

    >>> request = Arrival(arrival_seconds=0, prompt_tokens=100, completion_tokens=90)
    >>> scale_lengths([request], 0.5, max_prompt_tokens=40, max_completion_tokens=100)[0].num_tokens
    85
    """
    return [
        replace(
            arrival,
            prompt_tokens=min(max(round(arrival.prompt_tokens * scale), 1), max_prompt_tokens),
            completion_tokens=min(max(round(arrival.completion_tokens * scale), 1), max_completion_tokens),
        )
        for arrival in arrivals
    ]
