"""Policies x loads x seeds, simulated in parallel processes on the same requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastserve.config import ScheduleOptions
from fastserve.engine.policy import parse_policy
from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.capacity import mean_work, measure_capacity
from fastserve.evaluate.latency import Objective, latencies, summarize
from fastserve.evaluate.mix import make_traffic
from fastserve.evaluate.simulate import simulate
from fastserve.evaluate.simulated_machine import SimulatedMachine
from fastserve.evaluate.traffic import scale_to_rate
from fastserve.option import check_integer, check_number
from fastserve.types import Float64Array

DEFAULT_REQUESTS = 10_000  # of a mix, which has no length of its own
_CAPACITY_REQUESTS = 3000
_CAPACITY_SEED = 1_000_000  # not one of those compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to simulate.

    Args:
        traffic: name of a mix or of a trace.
        policies: as `fastserve.engine.policy.make_policy` reads them.
        loads: 1.0 is the machine's measured capacity for this traffic.
        num_seeds: runs of each policy and load, on other requests.
        num_requests: of a run; None is all of a trace, or DEFAULT_REQUESTS of a mix.
        data: the folder of published traces.
        cv: of the gaps between the arrivals of a mix, in place of its own.

    Raises:
        OptionError: a policy is unknown, or a number out of its range.
    """

    traffic: str
    machine: SimulatedMachine
    policies: tuple[str, ...]
    loads: tuple[float, ...] = (0.8,)
    num_seeds: int = 1
    num_requests: int | None = None
    data: Path | None = None
    cv: float | None = None
    options: ScheduleOptions = field(default_factory=lambda: ScheduleOptions(fair_share="off"))
    objective: Objective = field(default_factory=Objective)
    checks: bool = False

    def __post_init__(self) -> None:
        for policy in self.policies:
            parse_policy(policy)
        for load in self.loads:
            check_number("load", load, 0.0, 100.0, is_low_open=True)
        check_integer("seeds", self.num_seeds, low=1, high=1000)
        if self.num_requests is not None:
            check_integer("requests", self.num_requests, low=32, high=10_000_000)
        if self.cv is not None:
            check_number("cv", self.cv, 0.01, 100.0)


@dataclass(frozen=True, slots=True)
class Run:
    """One policy at one load on the requests of one seed, with what every counted request waited for."""

    policy: str
    load: float
    seed: int
    figures: dict[str, float]
    by_request: dict[str, Float64Array]

    def to_json(self) -> dict[str, Any]:
        return {"policy": self.policy, "load": self.load, "seed": self.seed, **self.figures}


def run_sweep(sweep: Sweep, *, processes: int | None = None) -> list[Run]:
    """All runs, policy by policy, then load by load and seed by seed.

    Args:
        processes: at once; None is as many as there are cores for this process.

    Raises:
        TraceError: no such traffic, or data that it needs is missing.
        OptionError: too few requests fit the machine.
    """
    capacity = capacity_of(sweep)
    tasks = list(product(sweep.policies, sweep.loads, range(sweep.num_seeds)))
    processes = min(processes or len(os.sched_getaffinity(0)), len(tasks))
    with _map_in(processes) as run_all:
        return list(run_all(partial(_run_one, sweep, capacity), tasks))


def capacity_of(sweep: Sweep) -> float:
    """Work per second of the sweep's machine under its traffic, measured once in this process."""
    return _measure(sweep.traffic, sweep.machine, sweep.data, sweep.cv)


@lru_cache(maxsize=64)
def _measure(name: str, machine: SimulatedMachine, data: Path | None, cv: float | None) -> float:
    traffic = make_traffic(name, data=data, cv=cv)
    num_requests = min(_CAPACITY_REQUESTS, traffic.num_requests or _CAPACITY_REQUESTS)
    return measure_capacity(machine, traffic.arrivals(num_requests, _CAPACITY_SEED))


def _run_one(sweep: Sweep, capacity: float, task: tuple[str, float, int]) -> Run:
    policy, load, seed = task
    machine = sweep.machine
    arrivals = _requests(sweep.traffic, sweep.data, sweep.cv, sweep.num_requests, seed)
    capacity_per_second = capacity / mean_work(machine, arrivals)
    outcome = simulate(
        machine,
        replace(sweep.options, policy=policy),
        scale_to_rate(arrivals, load * capacity_per_second),
        checks=sweep.checks,
    )
    figures = summarize(outcome, sweep.objective)
    figures["capacity_per_second"] = capacity_per_second
    return Run(policy, load, seed, figures, latencies(outcome))


@lru_cache(maxsize=4)
def _requests(
    name: str, data: Path | None, cv: float | None, num_requests: int | None, seed: int
) -> Seq[Arrival]:
    traffic = make_traffic(name, data=data, cv=cv)
    return traffic.arrivals(num_requests or traffic.num_requests or DEFAULT_REQUESTS, seed)


@contextmanager
def _map_in(processes: int) -> Iterator[Any]:
    """`map`, in so many processes."""
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield pool.map
