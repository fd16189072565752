from __future__ import annotations

import numpy as np
import pytest

from fastserve.config import ScheduleOptions
from fastserve.engine.policy import POLICY_NAMES
from fastserve.errors import OptionError
from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.capacity import mean_work, measure_capacity
from fastserve.evaluate.latency import Objective, latencies, summarize
from fastserve.evaluate.mix import short_chat
from fastserve.evaluate.simulate import Outcome, simulate
from fastserve.evaluate.simulated_machine import SimulatedCost, SimulatedMachine
from fastserve.evaluate.traffic import scale_to_rate

MACHINE = SimulatedMachine(
    name="tiny",
    source="",
    cost=SimulatedCost(
        fixed_seconds=0.01, prefill_seconds=1e-4, decode_seconds=1e-3, decode_attended_seconds=1e-5
    ),
    max_tokens=64,
    max_sequences=8,
    block_size=16,
    num_blocks=160,
    num_slow_blocks=640,
    swap_seconds_per_block=2e-4,
    is_swap_duplex=False,
)


def request(seconds: float, prompt: int, completion: int, **fields: object) -> Arrival:
    return Arrival(
        arrival_seconds=seconds,
        prompt_tokens=prompt,
        completion_tokens=completion,
        **fields,  # type: ignore[arg-type]
    )


def run(*arrivals: Arrival, policy: str = "fcfs", machine: SimulatedMachine = MACHINE) -> Outcome:
    return simulate(machine, ScheduleOptions(policy=policy), arrivals, checks=True)


def crowd(num_requests: int, *, load: float = 1.5, seed: int = 0) -> list[Arrival]:
    """Short chats, completions cut to a size that the tiny machine holds."""
    requests = [
        request(a.arrival_seconds, a.prompt_tokens, min(a.completion_tokens, 300))
        for a in short_chat().arrivals(num_requests, seed)
    ]
    rate = load * measure_capacity(MACHINE, requests) / mean_work(MACHINE, requests)
    return scale_to_rate(requests, rate)


def test_a_request_alone_takes_its_steps() -> None:
    """A prompt of 100 in chunks of 64, then two decodes that read 101 and 102 keys."""
    outcome = run(request(5.0, 100, 3))
    first = 5.0 + 2 * 0.01 + 100 * 1e-4
    assert outcome.first_token_seconds[0] == pytest.approx(first)
    assert outcome.end_seconds[0] == pytest.approx(first + 2 * 0.011 + 1e-5 * (101 + 102))
    assert outcome.longest_gap_seconds[0] == pytest.approx(0.011 + 1e-5 * 102)
    assert outcome.end_seconds[0] - 5.0 == pytest.approx(outcome.isolated_seconds[0])
    assert outcome.num_steps == 4


def test_the_clock_jumps_to_the_next_arrival() -> None:
    outcome = run(request(0.0, 1, 1), request(1e6, 1, 1))
    assert outcome.first_token_seconds.tolist() == pytest.approx([0.0101, 1e6 + 0.0101])
    assert outcome.busy_seconds == pytest.approx(0.0202)


def test_equal_prefixes_are_computed_once() -> None:
    prefixed = [request(i * 1.0, 512, 1, prefix_ids=(7,)) for i in range(2)]
    outcome = run(*prefixed, request(3.0, 512, 1))
    assert outcome.prefix_tokens == 512 - 16  # the last token is computed in any case, and so is its block
    took = outcome.end_seconds - outcome.arrival_seconds
    assert took[1] < took[0] / 2
    assert took[2] == pytest.approx(took[0])


def test_what_could_never_fit_is_refused_and_counted() -> None:
    outcome = run(request(0.0, 2000, 561), request(0.0, 2000, 560))
    figures = summarize(outcome, Objective())
    assert (figures["refused"], figures["unfinished"]) == (1, 0)
    assert np.isnan(outcome.end_seconds).tolist() == [True, False]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_policy_serves_all_under_pressure_with_the_invariants_kept(policy: str) -> None:
    arrivals = crowd(150)
    outcome = run(*arrivals, policy=policy)
    figures = summarize(outcome, Objective())
    assert (figures["unfinished"], figures["refused"]) == (0, 0)
    assert (outcome.end_seconds - outcome.arrival_seconds >= outcome.isolated_seconds - 1e-6).all()
    assert (outcome.first_token_seconds > outcome.arrival_seconds).all()


def test_a_run_is_the_same_again() -> None:
    arrivals = crowd(60)
    one, other = (run(*arrivals, policy="mlfq") for _ in range(2))
    assert one.end_seconds.tolist() == other.end_seconds.tolist()


def test_moves_take_the_time_that_they_take() -> None:
    """Two prompts of which memory holds one, by turns: nobody else runs while one is moved, and the slower
    the tier, the later both end. (In a crowd others run meanwhile.)"""
    slow = SimulatedMachine(**{**_fields(MACHINE), "swap_seconds_per_block": 6e-4})
    arrivals = [request(0.0, 1500, 200), request(1.0, 1500, 20)]
    fast_outcome = run(*arrivals, policy="mlfq-published")
    slow_outcome = run(*arrivals, policy="mlfq-published", machine=slow)
    assert fast_outcome.swapped_blocks_out > 100
    assert fast_outcome.swapped_blocks_in <= fast_outcome.swapped_blocks_out
    assert (slow_outcome.end_seconds > fast_outcome.end_seconds).all()


def test_shortest_first_has_a_lower_mean_than_first_come_when_prompts_differ() -> None:
    arrivals = [request(0.0, 900, 2)] + [request(0.005, 20, 2) for _ in range(6)]
    fcfs, sjf = (run(*arrivals, policy=policy) for policy in ("fcfs", "sjf"))
    assert sjf.end_seconds.mean() < fcfs.end_seconds.mean()


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(OptionError, match="policy 'lifo' is unknown"):
        run(request(0.0, 1, 1), policy="lifo")


def test_capacity_is_what_full_steps_do() -> None:
    """Eight decodes a step, which share its fixed time: work of 8 * 1 ms in 18 ms."""
    requests = [request(0.0, 1, 200) for _ in range(100)]
    machine = SimulatedMachine(
        **{
            **_fields(MACHINE),
            "cost": SimulatedCost(fixed_seconds=0.01, prefill_seconds=1e-3, decode_seconds=1e-3),
        }
    )
    assert measure_capacity(machine, requests) == pytest.approx(8 / 18, rel=0.02)


def test_load_one_keeps_the_machine_busy_and_half_of_it_does_not() -> None:
    shares = {}
    for load in (0.5, 1.0):
        arrivals = crowd(400, load=load)
        outcome = simulate(MACHINE, ScheduleOptions(), arrivals)
        in_system = (outcome.end_seconds - outcome.arrival_seconds).sum() / outcome.end_seconds.max()
        shares[load] = in_system / MACHINE.max_sequences
    assert shares[0.5] < 0.75
    assert shares[1.0] > 0.9


def test_capacity_needs_requests_that_fit() -> None:
    with pytest.raises(OptionError, match="0 of 100 requests fit"):
        measure_capacity(MACHINE, [request(0.0, 3000, 1)] * 100)


def test_figures_are_their_formulas() -> None:
    outcome = Outcome(
        arrival_seconds=np.array([0.0, 10.0, 20.0]),
        prompt_tokens=np.array([5, 5, 5]),
        completion_tokens=np.array([1, 3, 11]),
        isolated_seconds=np.array([1.0, 2.0, 3.0]),
        is_refused=np.array([False, False, False]),
        first_token_seconds=np.array([1.0, 13.0, 21.0]),
        end_seconds=np.array([1.0, 14.0, 23.0]),
        longest_gap_seconds=np.array([0.0, 0.8, 0.5]),
        preemptions=np.array([0, 3, 0]),
        evictions=np.array([0, 1, 2]),
        swapped_blocks_out=7,
        swapped_blocks_in=6,
        dropped_tokens=5,
        prefix_tokens=3,
        admitted_tokens=12,
        num_steps=9,
        busy_seconds=11.5,
    )
    by_request = latencies(outcome)
    assert by_request["ttft_seconds"].tolist() == [1.0, 3.0, 1.0]
    assert by_request["e2e_seconds"].tolist() == [1.0, 4.0, 3.0]
    np.testing.assert_equal(by_request["tpot_seconds"], [np.nan, 0.5, 0.2])
    np.testing.assert_equal(by_request["gap_seconds"], [np.nan, 0.8, 0.5])
    assert by_request["normalized_seconds"].tolist() == pytest.approx([1.0, 4 / 3, 3 / 11])
    assert by_request["slowdown"].tolist() == [1.0, 2.0, 1.0]
    figures = summarize(outcome, Objective(ttft_seconds=2.0, tpot_seconds=0.3))
    assert figures["goodput_per_second"] == pytest.approx(2 / 20)  # the second came too late
    assert figures["ttft_mean_seconds"] == pytest.approx(5 / 3)
    assert figures["gap_max_seconds"] == 0.8
    assert figures["preemptions_per_request"] == 1.0
    assert figures["evictions_per_request"] == 1.0
    assert figures["prefix_hit_share"] == 0.25
    assert figures["busy_share"] == 0.5


def _fields(machine: SimulatedMachine) -> dict[str, object]:
    return {**machine.to_json(), "cost": machine.cost}
