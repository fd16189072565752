"""What `boost` promises, on streams of requests in simulation."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fastserve.config import ScheduleOptions
from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.capacity import mean_work, measure_capacity
from fastserve.evaluate.mix import make_traffic, short_chat
from fastserve.evaluate.simulate import Outcome, simulate
from fastserve.evaluate.simulated_machine import SimulatedMachine, load_machine
from fastserve.evaluate.traffic import scale_to_rate

CODE = "traces/azure2023/AzureLLMInferenceTrace_code.csv"
MOONCAKE = "traces/mooncake_fast25/synthetic_trace.jsonl"


def run(policy: str, arrivals: Seq[Arrival], machine: SimulatedMachine) -> Outcome:
    return simulate(machine, ScheduleOptions(policy=policy, prefix_cache="off", fair_share="off"), arrivals)


def end_to_end(outcome: Outcome) -> np.ndarray:
    return outcome.end_seconds - outcome.arrival_seconds


def many_sizes(num_requests: int, seed: int) -> list[Arrival]:
    """Prompts of 50 to 4,000 tokens, completions of a few or of some hundreds; arrivals one a second."""
    rng = np.random.default_rng(seed)
    prompts = np.exp(rng.uniform(np.log(50), np.log(4000), num_requests)).astype(int)
    completions = np.where(rng.random(num_requests) < 0.7, 10, 400)
    return [
        Arrival(arrival_seconds=float(i), prompt_tokens=int(p), completion_tokens=int(c))
        for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]


def at_load(arrivals: Seq[Arrival], load: float, machine: SimulatedMachine) -> list[Arrival]:
    rate = load * measure_capacity(machine, arrivals) / mean_work(machine, arrivals)
    return scale_to_rate(arrivals, rate)


@dataclass(frozen=True)
class Bounds:
    """Over the same of `fcfs` and `hrrn`: the mean, the 99th percentile, the share of requests whose first
    token comes within 2 s and whose others come 0.1 s apart on average."""

    mean: float
    mean_of_hrrn: float | None = None
    p99: float | None = None
    good: float | None = None


def test_under_overload_by_all_sizes_the_mean_is_far_lower_and_the_tail_near_that_of_fcfs() -> None:
    machine = load_machine("cpu")
    arrivals = at_load(many_sizes(600, 0), 1.2, machine)
    ours, fcfs = (end_to_end(run(policy, arrivals, machine)) for policy in ("boost", "fcfs"))
    assert ours.mean() < 0.6 * fcfs.mean()
    assert np.quantile(ours, 0.99) < 1.3 * np.quantile(fcfs, 0.99)


def good_share(outcome: Outcome) -> float:
    first = outcome.first_token_seconds - outcome.arrival_seconds
    gaps = (outcome.end_seconds - outcome.first_token_seconds) / np.maximum(outcome.completion_tokens - 1, 1)
    return float(((first <= 2.0) & (gaps <= 0.1)).mean())


# What is promised of long runs, where these hold it and short ones tell it: at load 1.0, short chats hardly
# wait in them.
# What long runs do not hold (docs/scheduling.md, "was to reach and does not") is left out. Until 64
# completions have ended no wait is remembered: mixed has 0.94 of the mean of `hrrn` in so short a run.
@pytest.mark.parametrize(
    ("traffic", "name", "load", "num_requests", "seed", "bounds"),
    [
        ("sharegpt", "cpu", 1.08, 150, 0, Bounds(mean=0.96, mean_of_hrrn=1.0)),
        ("mixed", "cpu", 1.15, 300, 0, Bounds(mean=0.75, mean_of_hrrn=1.0, p99=1.0)),
        (CODE, "cpu", 1.0, 300, 0, Bounds(mean=0.5, p99=1.35)),
        (MOONCAKE, "a100", 1.05, 150, 0, Bounds(mean=0.8, p99=1.2)),
    ],
)
def test_on_real_traffic_beyond_capacity_it_keeps_what_is_promised(
    traffic, name, load, num_requests, seed, bounds, shared_data
) -> None:
    machine = load_machine(name)
    arrivals = list(make_traffic(traffic, data=shared_data).arrivals(num_requests, seed))
    arrivals = at_load(arrivals, load, machine)
    policies = ["boost", "fcfs", *(["hrrn"] if bounds.mean_of_hrrn else [])]
    ours, fcfs, *hrrn = (run(policy, arrivals, machine) for policy in policies)
    assert end_to_end(ours).mean() <= bounds.mean * end_to_end(fcfs).mean()
    for theirs in hrrn:
        assert end_to_end(ours).mean() <= bounds.mean_of_hrrn * end_to_end(theirs).mean()
    if bounds.p99 is not None:
        assert np.quantile(end_to_end(ours), 0.99) <= bounds.p99 * np.quantile(end_to_end(fcfs), 0.99)
    if bounds.good is not None:
        assert good_share(ours) >= bounds.good * good_share(fcfs)
    assert np.nanquantile(ours.longest_gap_seconds, 0.99) <= 2.0


@pytest.mark.parametrize(
    ("name", "make_arrivals"),
    [
        ("a100", lambda: short_chat().arrivals(500, 0)),
        ("a100", lambda: many_sizes(300, 3)),
        ("cpu", lambda: many_sizes(300, 3)),
    ],
)
def test_while_the_machine_keeps_up_nobody_loses_and_no_stream_stands_still(name, make_arrivals) -> None:
    machine = load_machine(name)
    arrivals = at_load(list(make_arrivals()), 0.7, machine)
    ours, fcfs = run("boost", arrivals, machine), run("fcfs", arrivals, machine)
    assert end_to_end(ours).mean() <= 1.02 * end_to_end(fcfs).mean()
    assert np.quantile(end_to_end(ours), 0.99) <= 1.05 * np.quantile(end_to_end(fcfs), 0.99)
    assert np.nanquantile(ours.longest_gap_seconds, 0.99) <= 2.0


def test_admission_by_peak_makes_evictions_for_lack_of_blocks_rare() -> None:
    machine = replace(load_machine("cpu"), num_blocks=800, num_slow_blocks=0)
    arrivals = at_load(many_sizes(400, 4), 1.3, machine)
    evictions = {}
    for quantile in (0.0, 0.6):
        options = ScheduleOptions(policy="mlfq", prefix_cache="off", fair_share="off", peak_quantile=quantile)
        evictions[quantile] = simulate(machine, options, arrivals).evictions.mean()
    assert evictions[0.6] < 0.5 * evictions[0.0]


def test_an_objective_of_the_first_token_is_kept_by_more_where_the_late_go_last() -> None:
    machine = load_machine("cpu")
    arrivals = at_load(many_sizes(400, 5), 1.2, machine)
    kept = {}
    for objective in (None, 5.0):
        options = ScheduleOptions(
            policy="fcfs", prefix_cache="off", fair_share="off", first_token_seconds=objective
        )
        outcome = simulate(machine, options, arrivals)
        kept[objective] = (outcome.first_token_seconds - outcome.arrival_seconds <= 5.0).mean()
        assert not np.isnan(outcome.end_seconds).any()
    assert kept[5.0] > 1.5 * kept[None]


def test_a_stream_of_tiny_requests_does_not_starve_a_long_prompt() -> None:
    machine = load_machine("a100")
    tiny = [
        Arrival(arrival_seconds=float(i), prompt_tokens=100, completion_tokens=4, tenant="tiny")
        for i in range(3000)
    ]
    stream = at_load(tiny, 1.5, machine)
    long = Arrival(arrival_seconds=2.0, prompt_tokens=60_000, completion_tokens=4, tenant="long")
    arrivals = sorted([*stream, long], key=lambda arrival: arrival.arrival_seconds)
    index = arrivals.index(long)
    ours, fcfs = (end_to_end(run(policy, arrivals, machine))[index] for policy in ("boost", "fcfs"))
    last = arrivals[-1].arrival_seconds
    assert ours < 0.7 * last, "it waited for the stream to end"
    assert ours < 2.5 * fcfs, "it may wait for 1.3 times what a newcomer would, its own work in it"


@pytest.mark.parametrize("name", ["a100", "cpu"])
def test_at_its_limit_it_is_first_come_first_served_to_the_step(name) -> None:
    machine = load_machine(name)
    arrivals = at_load(many_sizes(300, 3), 1.2, machine)
    limit = "boost:strength=0,patience=1000,least_scale_seconds=0.001,express_seconds=0"
    ours, fcfs = run(limit, arrivals, machine), run("fcfs", arrivals, machine)
    np.testing.assert_allclose(ours.end_seconds, fcfs.end_seconds)


@pytest.mark.parametrize("name", ["a100", "cpu"])
def test_nobody_is_much_later_than_somebody_is_in_order_of_arrival(name) -> None:
    machine = load_machine(name)
    arrivals = at_load(many_sizes(600, 4), 1.2, machine)
    ours, fcfs = (run(policy, arrivals, machine) for policy in ("boost:patience=1.2", "fcfs"))
    assert end_to_end(ours).max() < 1.5 * end_to_end(fcfs).max(), "who is short may begin 1.8 times as late"
    first = [outcome.first_token_seconds - outcome.arrival_seconds for outcome in (ours, fcfs)]
    assert first[0].mean() < 0.85 * first[1].mean()


class Labels:
    """A predictor whose labels may be anything."""

    def __init__(self, labels: Seq[str]) -> None:
        self._labels = labels

    def kind(self, sequence) -> str:
        return self._labels[sequence.sequence_id]


@pytest.mark.parametrize("labels", ["random", "turned round half way"])
def test_a_bad_predictor_costs_at_most_a_tenth_of_the_mean(labels) -> None:
    machine = load_machine("a100")
    arrivals = at_load(many_sizes(600, 1), 1.15, machine)
    rng = np.random.default_rng(0)
    if labels == "random":
        kinds = [str(rng.integers(8)) for _ in arrivals]
    else:
        kinds = [str((a.completion_tokens > 100) ^ (i < 300)) for i, a in enumerate(arrivals)]
    options = ScheduleOptions(policy="boost", prefix_cache="off", fair_share="off")
    plain = end_to_end(simulate(machine, options, arrivals))
    misled = end_to_end(simulate(machine, options, arrivals, predictor=Labels(kinds)))
    assert misled.mean() < 1.1 * plain.mean()


@pytest.mark.parametrize("policy", ["boost", "gittins"])
def test_under_memory_pressure_a_request_is_evicted_a_few_times_at_most(policy) -> None:
    machine = replace(load_machine("a100"), num_blocks=1000)
    outcome = run(policy, at_load(many_sizes(400, 2), 1.2, machine), machine)
    assert outcome.evictions.max() <= 1 + np.log2(outcome.completion_tokens.max())
    assert outcome.evictions.mean() < 0.5
