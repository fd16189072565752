"""Tests of a server under load: a traffic's requests, made into prompts, sent at a rate, told in figures."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fastserve.errors import OptionError
from fastserve.evaluate.arrival import Arrival, gamma_gaps
from fastserve.evaluate.endpoint import Abilities, Endpoint, EndpointOptions
from fastserve.evaluate.exchange import Exchange, PlannedRequest
from fastserve.evaluate.find_rate import find_rate
from fastserve.evaluate.latency import Objective
from fastserve.evaluate.load_figures import count_failures, failure_messages, summarize_load
from fastserve.evaluate.load_run import LoadRun, run_closed_loop, run_open_loop
from fastserve.evaluate.mix import make_traffic
from fastserve.evaluate.prompt_file import read_prompts
from fastserve.evaluate.prompt_text import LONG_WORDS, SHORT_WORDS, PromptText, TokenRate
from fastserve.evaluate.slo import Slo
from fastserve.evaluate.trace import find_trace
from fastserve.evaluate.traffic import Clients, Replay, scale_lengths, scale_to_rate
from fastserve.option import INT32_MAX, check_integer, check_number

_WARM_UP_CONCURRENCY = 4
_WARM_UP_SEED = 1_000_000
_LEAST_REQUESTS = 16  # of a run of some seconds, so that its percentiles mean something


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What is sent.

    Attributes:
        traffic: name of a mix or of a trace.
        data: the folder of published traces and texts.
        prompts: a data set whose prompts are sent, at random, in place of text of the traffic's lengths; a
            path, or one within `data`.
        num_requests: of a run; None is as many as come in `seconds`, or, in a closed loop, 64.
        seconds: how long requests of a run arrive.
        seed: of the requests; prompts also differ from run to run, so that none is found in a cache.
        burstiness: shape of gamma distributed gaps between arrivals, in place of the traffic's own: 1 is
            Poisson, below it requests come in bursts (the coefficient of variation is 1 / sqrt(burstiness)).
        time_scale: the times of a trace, stretched by so much, in place of a rate.
        length_scale: of prompts and completions, to suit the machine.
        max_prompt_tokens, max_completion_tokens: longer ones count as that long.
        warm_up: requests sent and not counted before the first run.
        stall_seconds: a request that brings no text for so long is given up.

    Raises:
        OptionError: an option is out of its range.
    """

    traffic: str
    data: Path | None = None
    prompts: str | None = None
    num_requests: int | None = None
    seconds: float = 60.0
    seed: int = 0
    burstiness: float | None = None
    time_scale: float | None = None
    length_scale: float = 1.0
    max_prompt_tokens: int = INT32_MAX
    max_completion_tokens: int = INT32_MAX
    warm_up: int = 8
    stall_seconds: float = 120.0
    objective: Objective = field(default_factory=Objective)
    slo: Slo | None = None

    def __post_init__(self) -> None:
        if self.num_requests is not None:
            check_integer("requests", self.num_requests, low=2, high=1_000_000)
        check_number("seconds", self.seconds, 0.0, 1e6, is_low_open=True)
        check_integer("seed", self.seed, low=0)
        if self.burstiness is not None:
            check_number("burstiness", self.burstiness, 1e-3, 1e3)
        if self.time_scale is not None:
            check_number("time_scale", self.time_scale, 0.0, 1e6, is_low_open=True)
            if self.burstiness is not None:
                raise OptionError(
                    "time_scale keeps the times of a trace and burstiness replaces them",
                    hint="leave one of the two out",
                )
        check_number("length_scale", self.length_scale, 0.0, 1e3, is_low_open=True)
        check_integer("max_prompt_tokens", self.max_prompt_tokens, low=1)
        check_integer("max_completion_tokens", self.max_completion_tokens, low=1)
        check_integer("warm_up", self.warm_up, low=0, high=100_000)
        check_number("stall_seconds", self.stall_seconds, 0.1, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRow:
    """One run: at a rate of requests a second, or with so many at once."""

    rate: float | None
    concurrency: int | None
    run: LoadRun
    figures: dict[str, float]
    is_held: bool | None  # whether it held the SLO; None without one

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"rate": self.rate, "concurrency": self.concurrency, **self.figures}
        row["failures"] = count_failures(self.run.exchanges)
        row["failure_messages"] = failure_messages(self.run.exchanges)
        if self.is_held is not None:
            row |= {"slo_is_held": self.is_held, "was_stopped_early": self.run.was_stopped}
        return row


class LoadTest:
    """Runs against one endpoint. Use it as a context; entering asks the server what it can and warms it up.

    Raises:
        MeasurementError: from entering: the server is not there, or does not answer.
        OptionError, TraceError: the traffic is unknown, or data that it needs is missing.
    """

    def __init__(self, endpoint: EndpointOptions, options: LoadOptions) -> None:
        cv = None if options.burstiness is None else options.burstiness**-0.5
        self._traffic = make_traffic(options.traffic, data=options.data, cv=cv)
        if options.time_scale is not None and not isinstance(self._traffic, Replay | Clients):
            raise OptionError(
                f"time_scale={options.time_scale:g} needs a trace with times; {self._traffic.name} has none",
                hint="give a rate, or a trace such as those of Azure, Mooncake or ServeGen",
            )
        self.options = options
        self.text = PromptText(options.data)
        self.prompts: list[str] | None = None
        if options.prompts is not None:
            self.prompts = read_prompts(find_trace(options.prompts, options.data))
        self.token_rate = TokenRate()
        self.abilities = Abilities(ignores_eos=True, tells_usage=True)
        self.rows: list[LoadRow] = []
        self._endpoint = Endpoint(endpoint)

    async def __aenter__(self) -> Self:
        await self._endpoint.__aenter__()
        try:
            await self._prepare()
        except BaseException:
            await self._endpoint.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._endpoint.__aexit__(kind, error, trace)

    async def run_at(self, rate: float | None, *, stops_when_lost: bool = False) -> LoadRow:
        """An open loop at a mean rate of requests a second, or, with None, at the trace's own times.

        Args:
            stops_when_lost: end as soon as the SLO is missed for sure.
        """
        planned = self.plan(rate)
        slo = self.options.slo

        def is_lost(exchanges: Seq[Exchange], now: float) -> bool:
            return slo is not None and slo.is_lost(exchanges, planned, now)

        run = await run_open_loop(
            self._endpoint,
            planned,
            self.abilities,
            stall_seconds=self.options.stall_seconds,
            observe=is_lost if stops_when_lost else None,
        )
        return self._note(run, rate=rate)

    async def run_with(self, concurrency: int) -> LoadRow:
        """A closed loop of so many requests at once."""
        planned = self.plan(None, num_requests=self.options.num_requests or max(64, 4 * concurrency))
        run = await run_closed_loop(
            self._endpoint,
            planned,
            self.abilities,
            concurrency=concurrency,
            stall_seconds=self.options.stall_seconds,
        )
        return self._note(run, concurrency=concurrency)

    async def find_rate(
        self, *, start: float, precision: float, report: Callable[[LoadRow], None] | None = None
    ) -> tuple[float, float]:
        """The highest rate found that holds the SLO, and the lowest that does not. Raises as `find_rate`.

        Args:
            report: called with each run.
        """

        async def holds_at(rate: float) -> bool:
            row = await self.run_at(rate, stops_when_lost=True)
            if report is not None:
                report(row)
            return bool(row.is_held)

        return await find_rate(holds_at, start=start, precision=precision)

    def plan(self, rate: float | None, *, num_requests: int | None = None) -> list[PlannedRequest]:
        """The requests of the next run, with prompts that no run before had."""
        options = self.options
        arrivals = self._arrivals(rate, num_requests or options.num_requests)
        return self._with_prompts(arrivals, (options.seed, len(self.rows)))

    def _with_prompts(self, arrivals: Seq[Arrival], seed: tuple[int, ...]) -> list[PlannedRequest]:
        if self.prompts is None:
            return [
                PlannedRequest(
                    arrival=arrival, prompt=self.text.of_arrival(arrival, self.token_rate, (*seed, index))
                )
                for index, arrival in enumerate(arrivals)
            ]
        drawn = np.random.default_rng(seed).integers(len(self.prompts), size=len(arrivals))
        chosen = [self.prompts[index] for index in drawn]
        return [
            PlannedRequest(
                arrival=replace(arrival, prompt_tokens=self.token_rate.tokens_of(len(prompt.split()))),
                prompt=prompt,
            )
            for arrival, prompt in zip(arrivals, chosen, strict=True)
        ]

    def _arrivals(self, rate: float | None, num_requests: int | None) -> list[Arrival]:
        options = self.options
        if num_requests is None and rate is not None:
            num_requests = max(round(rate * options.seconds), _LEAST_REQUESTS)
        arrivals = (
            self._of_seconds() if num_requests is None else self._traffic.arrivals(num_requests, options.seed)
        )
        arrivals = scale_lengths(
            arrivals,
            options.length_scale,
            max_prompt_tokens=options.max_prompt_tokens,
            max_completion_tokens=options.max_completion_tokens,
        )
        if rate is None:
            scale = options.time_scale or 1.0
            return [replace(a, arrival_seconds=a.arrival_seconds * scale) for a in arrivals]
        if options.burstiness is not None:
            rng = np.random.default_rng([options.seed, 4])
            times = np.cumsum(gamma_gaps(rng, len(arrivals), rate=1.0, cv=options.burstiness**-0.5)).tolist()
            arrivals = [replace(a, arrival_seconds=t) for a, t in zip(arrivals, times, strict=True)]
        return scale_to_rate(arrivals, rate)

    def _of_seconds(self) -> list[Arrival]:
        """All requests that a trace has within the run's seconds, at its own times."""
        options = self.options
        limit = options.seconds / (options.time_scale or 1.0)
        number = _LEAST_REQUESTS
        while True:
            arrivals = self._traffic.arrivals(number, options.seed)
            if arrivals[-1].arrival_seconds > limit:
                within = [a for a in arrivals if a.arrival_seconds <= limit]
                return within if len(within) > 1 else arrivals[:2]
            number *= 2

    async def _prepare(self) -> None:
        counts: list[int | None] = []
        for num_words in (SHORT_WORDS, LONG_WORDS):
            prompt = self.text.of_words(num_words, (self.options.seed, 13))
            probe = Exchange(planned=_probe(prompt), arrival_seconds=0.0)
            if not counts:
                self.abilities = await self._endpoint.learn_abilities(probe)
            else:  # may be too long for a small context
                await self._endpoint.send(probe, max_tokens=1, abilities=self.abilities)
            counts.append(probe.prompt_tokens)
        short, long = counts
        if short is not None:
            rate = TokenRate(per_word=short / SHORT_WORDS)
            self.token_rate = rate if long is None else TokenRate.from_counts(short, long)
        if self.options.warm_up:
            seed = self.options.seed + _WARM_UP_SEED
            arrivals = scale_lengths(
                self._traffic.arrivals(max(self.options.warm_up, 2), seed),
                self.options.length_scale,
                max_prompt_tokens=self.options.max_prompt_tokens,
                max_completion_tokens=self.options.max_completion_tokens,
            )[: self.options.warm_up]
            planned = self._with_prompts(arrivals, (seed,))
            await run_closed_loop(
                self._endpoint,
                planned,
                self.abilities,
                concurrency=_WARM_UP_CONCURRENCY,
                stall_seconds=self.options.stall_seconds,
            )

    def _note(self, run: LoadRun, *, rate: float | None = None, concurrency: int | None = None) -> LoadRow:
        figures = summarize_load(run, self.options.objective)
        slo = self.options.slo
        is_held = None if slo is None else not run.was_stopped and slo.is_held(figures)
        row = LoadRow(rate=rate, concurrency=concurrency, run=run, figures=figures, is_held=is_held)
        self.rows.append(row)
        return row


def _probe(prompt: str) -> PlannedRequest:
    return PlannedRequest(
        arrival=Arrival(arrival_seconds=0.0, prompt_tokens=1, completion_tokens=1), prompt=prompt
    )
