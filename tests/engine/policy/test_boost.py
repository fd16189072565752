"""Arrival brought forward by expected work: what it orders, at its limits and in between."""

from __future__ import annotations

from contextlib import suppress
from itertools import count, pairwise

import pytest
from fake_executable import make_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork
from fastserve.engine.engine import Engine
from fastserve.engine.policy.boost import Boost
from fastserve.engine.policy.gittins import Gittins
from fastserve.engine.policy.hrrn import Hrrn
from fastserve.engine.policy.policy import rank
from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.sequence import Sequence
from fastserve.errors import DeadlineError
from fastserve.types import SamplingParams

COST = StepCost(fixed_seconds=0.01, prefill_seconds=0.001, decode_seconds=0.001)


def make(**knobs: float) -> Boost:
    """Without an express lane, unless it is asked for."""
    knobs = {"express_seconds": 0.0, **knobs}
    return Boost(ExpectedWork(OnlineStepCost(COST)), max_sequences=16, **knobs)


def sequence_of(prompt_tokens: int, *, arrival: float = 0.0, sequence_id: int = 0) -> Sequence:
    return Sequence(
        sequence_id=sequence_id,
        token_ids=[1] * prompt_tokens,
        num_prompt_tokens=prompt_tokens,
        max_tokens=10_000,
        arrival_seconds=arrival,
    )


def enter(policy: Boost | Gittins | Hrrn, sequence: Sequence, now: float) -> None:
    """As the scheduler has it: what is expected of it is known first, and forgotten last."""
    policy._work.enter(sequence)
    policy.enter(sequence, now)


def leave(policy: Boost | Gittins | Hrrn, sequence: Sequence) -> None:
    policy.leave(sequence)
    policy._work.leave(sequence)


def decode(policy: Boost, sequence: Sequence, num_tokens: int, *, now: float) -> None:
    for _ in range(num_tokens):
        sequence.num_computed_tokens = len(sequence.token_ids)
        sequence.is_started = True
        sequence.attained_seconds += 0.01
        policy.serve([sequence], 0.01, now)
        sequence.token_ids.append(1)


ARRIVALS = st.lists(st.tuples(st.floats(0.0, 1000.0), st.integers(1, 20_000)), min_size=2, max_size=12).map(
    sorted
)


@settings(deadline=None)
@given(ARRIVALS)
def test_without_strength_it_is_first_come_first_served(arrivals) -> None:
    policy = make(strength=0.0, least_scale_seconds=1e-6)
    sequences = [sequence_of(n, arrival=a, sequence_id=i) for i, (a, n) in enumerate(arrivals)]
    for sequence in sequences:
        enter(policy, sequence, 1000.0)
    policy.refresh(sequences, 1000.0)
    ordered = sorted(sequences, key=rank)
    for first, second in pairwise(ordered):
        assert first.arrival_seconds <= second.arrival_seconds + 1e-4


@settings(deadline=None)
@given(ARRIVALS)
def test_with_a_huge_scale_it_is_least_expected_work_first(arrivals) -> None:
    policy = make(least_scale_seconds=1e7, most_scale_seconds=1e7, most_boost=100.0)
    sequences = [sequence_of(n, arrival=a, sequence_id=i) for i, (a, n) in enumerate(arrivals)]
    for sequence in sequences:
        enter(policy, sequence, 1000.0)
    lengths = [sequence.num_prompt_tokens for sequence in sorted(sequences, key=rank)]
    assert all(a <= b * 1.01 + 2 for a, b in pairwise(lengths))


class Oracle:
    """A predictor that knows how long completions will be."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def kind(self, sequence: Sequence) -> str:
        return str(self._lengths[sequence.sequence_id])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.sampled_from([2, 20, 200, 2000]), st.floats(0.0, 1000.0)),
        min_size=2,
        max_size=12,
    )
)
def test_with_a_huge_scale_and_known_lengths_it_is_shortest_remaining_first(requests) -> None:
    lengths = [length for _, length, _ in requests]
    work = ExpectedWork(OnlineStepCost(COST), predictor=Oracle([*lengths, *[2, 20, 200, 2000] * 32]))
    knobs = {"least_scale_seconds": 1e7, "most_scale_seconds": 1e7, "most_boost": 100.0}
    policy = Boost(work, max_sequences=16, express_seconds=0.0, **knobs)
    for index, length in enumerate([2, 20, 200, 2000] * 32):
        ended = sequence_of(1, sequence_id=len(requests) + index)
        enter(policy, ended, 0.0)
        ended.token_ids += [1] * length
        ended.is_complete = True
        leave(policy, ended)
    sequences = [sequence_of(n, arrival=a, sequence_id=i) for i, (n, _, a) in enumerate(requests)]
    for sequence in sequences:
        enter(policy, sequence, 1000.0)
    remaining = [
        COST.prefill_seconds_of(s.num_prompt_tokens) + work.token_seconds(s) * lengths[s.sequence_id]
        for s in sorted(sequences, key=rank)
    ]
    assert all(a <= 1.06 * b + 0.003 for a, b in pairwise(remaining)), "prices count as powers of 1.05"


@settings(deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 100_000), st.floats(0.0, 1e4), st.floats(0.0, 1e4))
def test_nobody_is_overtaken_by_one_that_came_later_than_the_bound(long, short, waited, later) -> None:
    policy = make(most_scale_seconds=30.0, most_boost=4.0)
    old, new = sequence_of(long), sequence_of(short, arrival=later, sequence_id=1)
    enter(policy, old, 0.0)
    policy.refresh([old], waited)
    enter(policy, new, later)
    policy.refresh([old, new], max(waited, later))
    if later > 4.0 * 30.0 * 1.25 + 10:  # the scale is rounded
        assert old.rank < new.rank


def test_while_nobody_waits_a_little_later_does_not_overtake_and_in_a_backlog_it_does() -> None:
    policy = make()
    long, short = sequence_of(2000), sequence_of(20, arrival=8.0, sequence_id=1)
    enter(policy, long, 0.0)
    enter(policy, short, 8.0)
    assert long.rank < short.rank
    backlog = [sequence_of(5000, arrival=8.5, sequence_id=2 + index) for index in range(10)]
    for sequence in backlog:
        enter(policy, sequence, 8.5)
    for tenth in range(90, 120):
        policy.refresh([long, short, *backlog], tenth / 10)
    assert short.rank < long.rank


def test_an_older_completion_of_a_heavy_tail_yields_to_a_newcomer() -> None:
    policy = make(least_scale_seconds=20.0, margin=0.1)
    for index in range(100):
        ended = sequence_of(10, sequence_id=100 + index)
        enter(policy, ended, 0.0)
        ended.token_ids += [1] * (20 if index % 10 else 2000)
        ended.is_complete = True
        leave(policy, ended)
    old, new = sequence_of(10), sequence_of(10, arrival=3.0, sequence_id=1)
    enter(policy, old, 0.0)
    decode(policy, old, 100, now=2.5)
    enter(policy, new, 3.0)
    assert old.rank < new.rank, "who runs goes on"
    assert policy.outranks(new, old), "and gives up its memory"


def test_the_highest_response_ratio_goes_first_and_nobody_that_has_begun_is_passed() -> None:
    policy = Hrrn(ExpectedWork(OnlineStepCost(COST)))
    long, short = sequence_of(20_000), sequence_of(20, arrival=5.0, sequence_id=1)
    begun = sequence_of(50_000, arrival=6.0, sequence_id=2)
    for sequence in (long, short, begun):
        enter(policy, sequence, sequence.arrival_seconds)
    begun.is_started = True
    policy.serve([begun], 0.1, 7.0)
    policy.refresh([long, short, begun], 7.0)
    assert sorted([long, short, begun], key=rank) == [begun, short, long]
    newer = sequence_of(20, arrival=999.0, sequence_id=3)
    enter(policy, newer, 999.0)
    policy.refresh([long, newer], 1000.0)
    assert long.rank < newer.rank


def test_gittins_prefers_a_chance_to_complete_soon() -> None:
    policy = Gittins(ExpectedWork(OnlineStepCost(COST)))
    long, short = sequence_of(2000), sequence_of(20, arrival=5.0, sequence_id=1)
    enter(policy, long, 0.0)
    enter(policy, short, 5.0)
    assert short.rank < long.rank
    assert policy.outranks(short, long)


def test_a_call_of_a_program_that_has_had_much_service_is_no_newcomer() -> None:
    policy = make(least_scale_seconds=20.0)
    newcomer, later_call = sequence_of(50), sequence_of(50, sequence_id=1)
    later_call.inherited_seconds = 50.0
    enter(policy, later_call, 0.0)
    enter(policy, newcomer, 0.0)
    assert newcomer.rank < later_call.rank


def test_a_short_prompt_goes_first_by_the_lane_until_its_first_token_and_few_at_a_time() -> None:
    policy = make(express_seconds=0.02)  # prompts of up to 20 tokens
    long = sequence_of(5000, arrival=49.0)
    enter(policy, long, 0.0)
    short = [sequence_of(10, arrival=50.0, sequence_id=1 + index) for index in range(3)]
    for sequence in short:
        enter(policy, sequence, 50.0)
    assert [sequence.rank < long.rank for sequence in short] == [True, True, False]  # an eighth of 16
    assert not policy.outranks(short[0], long)
    policy.serve([short[0]], 0.01, 50.1)  # a chunk of its prompt
    policy.refresh([long, *short], 50.2)
    assert long.rank < short[2].rank, "the first one has no token yet"
    decode(policy, short[0], 1, now=50.2)
    short[0].is_held = True  # whether it has another turn or not
    policy.refresh([long, *short], 50.3)
    assert short[2].rank < long.rank


def test_the_lane_is_closed_while_somebody_is_due() -> None:
    policy = make(express_seconds=0.02, patience=1.0)
    long = sequence_of(5000)
    enter(policy, long, 0.0)
    policy.refresh([long], 200.0)
    short = sequence_of(10, arrival=200.0, sequence_id=1)
    enter(policy, short, 200.0)
    assert long.rank < short.rank
    leave(policy, long)
    policy.refresh([short], 200.2)
    other = sequence_of(5000, arrival=150.0, sequence_id=2)
    enter(policy, other, 200.2)
    assert short.rank < other.rank


def test_the_lane_is_open_to_those_who_go_before_whoever_is_due_anyway() -> None:
    policy = make(express_seconds=0.02, patience=1.0)
    long = sequence_of(5000)
    long.class_index = 1
    enter(policy, long, 0.0)
    policy.refresh([long], 200.0)
    short = [sequence_of(10, arrival=200.0, sequence_id=1 + index) for index in range(2)]
    for index, sequence in enumerate(short):
        sequence.class_index = index
        enter(policy, sequence, 200.0)
    assert short[0].rank < long.rank < short[1].rank


@pytest.mark.parametrize("state", ["is_held", "is_relegated"])
def test_whoever_cannot_go_first_is_not_due(state: str) -> None:
    policy = make(express_seconds=0.02, patience=1.0)
    long, other = sequence_of(5000), sequence_of(5000, arrival=0.1, sequence_id=2)
    setattr(long, state, True)
    for sequence in (long, other):
        enter(policy, sequence, 0.0)
    policy.refresh([long, other], 200.0)
    assert other.rank < long.rank, "it is due alone"
    leave(policy, other)
    policy.refresh([long], 400.0)
    short = sequence_of(10, arrival=400.0, sequence_id=1)
    enter(policy, short, 400.0)
    assert short.rank < long.rank, "the lane is open"


def test_small_ones_go_first_only_as_long_as_everybody_can_still_be_served_in_time() -> None:
    policy = make(patience=2.0, least_scale_seconds=1000.0, most_scale_seconds=1000.0)
    old = [sequence_of(2000, arrival=index * 0.01, sequence_id=index) for index in range(10)]
    for sequence in old:
        enter(policy, sequence, 0.1)
    new = sequence_of(10, arrival=5.0, sequence_id=10)
    enter(policy, new, 5.0)
    policy.refresh([*old, new], 5.0)
    assert new.rank < min(sequence.rank for sequence in old)
    work = sum(sequence.standing.work_seconds for sequence in old)
    bound = 2.0 * (work + new.standing.work_seconds)  # twice what whoever came last would have waited
    policy.refresh([*old, new], bound - work - 1.0)
    assert new.rank < min(sequence.rank for sequence in old)
    policy.refresh([*old, new], bound - work + 1.0)
    assert max(sequence.rank for sequence in old) < new.rank, "the last of them would be late"
    assert not policy.outranks(old[0], new)


def inform(policy: Boost, *, seconds_per_token: float = 0.001) -> None:
    """Of what steps cost, and of completions of 20 tokens, as many as it takes."""
    for tokens in range(32):
        policy._work.cost.observe(StepWork(decode_tokens=tokens % 8), tokens % 8 * seconds_per_token)
        policy._work.cost.observe(StepWork.of_prefill(tokens), tokens * seconds_per_token)
    for index in range(64):
        ended = sequence_of(1, sequence_id=1000 + index)
        policy._work.enter(ended)
        ended.token_ids += [1] * 20
        ended.is_complete = True
        policy._work.leave(ended)


def longest_wait_of_crowd(policy: Boost, *, now: float) -> tuple[float, float]:
    """Before and after ten prompts that came and left without a turn."""
    crowd = [sequence_of(2000, arrival=now, sequence_id=index) for index in range(10)]
    for sequence in crowd:
        enter(policy, sequence, now)
    policy.refresh(crowd, now)
    before = policy.longest_wait_seconds(now)
    for sequence in crowd:
        leave(policy, sequence)
    return before, policy.longest_wait_seconds(now + 1.0)


def test_the_longest_wait_is_remembered_but_not_one_that_was_reckoned_before_costs_were_known() -> None:
    policy = make(patience=1.6)
    before, after = longest_wait_of_crowd(policy, now=0.0)
    assert before > 30.0
    assert after == 2.0, "the least patience"
    inform(policy)
    policy.refresh([], 10.0)
    before, after = longest_wait_of_crowd(policy, now=10.0)
    assert 0.98 * before < after < before


def test_who_came_before_costs_were_known_counts_for_what_is_known_then() -> None:
    policy = make(patience=1.6)
    crowd = [sequence_of(2000, sequence_id=index) for index in range(10)]
    for sequence in crowd:
        enter(policy, sequence, 0.0)
    policy.refresh(crowd, 0.0)
    guessed = policy.longest_wait_seconds(0.0)
    inform(policy, seconds_per_token=0.0001)
    policy.refresh(crowd, 1.0)
    assert policy.longest_wait_seconds(1.0) < 0.15 * guessed
    newcomer = sequence_of(2000, arrival=1.0, sequence_id=10)
    enter(policy, newcomer, 1.0)
    assert newcomer.standing.work_seconds == crowd[0].standing.work_seconds


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 3)), min_size=1, max_size=20))
def test_whatever_the_clock_does_ranks_are_distinct_and_the_longest_wait_is_no_longer(jumps) -> None:
    def longest_wait_seconds(times: list[float]) -> float:
        policy = make()
        inform(policy)
        live = [sequence_of(1 + 700 * index, arrival=0.1 * index, sequence_id=index) for index in range(8)]
        for sequence in live:
            enter(policy, sequence, 1.0)
        for now, (_, place) in zip(times, jumps, strict=False):
            policy.refresh(live, now)
            decode(policy, live[place], 1, now=now)
            assert len({sequence.rank for sequence in live}) == len(live)
        late = sequence_of(10, arrival=times[-1], sequence_id=8)
        enter(policy, late, times[-1])
        policy.refresh([*live, late], times[-1])
        return policy.longest_wait_seconds(times[-1])

    still = longest_wait_seconds([1.0] * (len(jumps) + 1))
    assert longest_wait_seconds([*(now for now, _ in jumps), 1e6 + 1]) <= 1.000001 * still


def test_a_completion_that_was_given_up_teaches_no_length() -> None:
    policy = make()
    for index in range(100):
        given_up = sequence_of(10, sequence_id=100 + index)
        enter(policy, given_up, 0.0)
        given_up.token_ids += [1] * 3
        leave(policy, given_up)
    new = sequence_of(10, sequence_id=1)
    enter(policy, new, 1.0)
    assert new.standing.work_seconds > 0.5, "as if nothing were known"


def test_a_completion_of_one_token_at_most_goes_before_one_that_may_be_long() -> None:
    for policy in (make(least_scale_seconds=20.0), Gittins(ExpectedWork(OnlineStepCost(COST)))):
        story, score = sequence_of(50), sequence_of(50, sequence_id=1)
        score.max_tokens = 1
        enter(policy, story, 0.0)
        enter(policy, score, 0.0)
        assert score.rank < story.rank


def test_a_prompt_whose_beginning_is_in_the_cache_counts_for_the_rest_of_it() -> None:
    policy = make(least_scale_seconds=20.0)
    cold, warm = sequence_of(3000), sequence_of(8000, sequence_id=1)
    warm.num_cached_tokens = 7900
    enter(policy, cold, 0.0)
    enter(policy, warm, 0.0)
    assert warm.rank < cold.rank


def test_a_change_to_boost_keeps_how_long_everybody_has_waited() -> None:
    policy = make()
    long = sequence_of(20_000, arrival=0.0)
    short = [sequence_of(50, arrival=1.0 + i, sequence_id=1 + i) for i in range(30)]
    for sequence in (long, *short):
        enter(policy, sequence, 40.0)
    for tenth in range(100):
        policy.refresh([long, *short], 40.0 + tenth / 10)
    assert short[0].rank < long.rank, "not all of them are due"


@settings(deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 40),  # tokens of the prompt
            st.integers(1, 12),  # of the completion
            st.integers(0, 20),  # the step before which it comes
            st.integers(1, 3),  # completions
            st.sampled_from(["interactive", "batch"]),
            st.sampled_from([None, 5.0, 100.0]),  # ms
        ),
        max_size=12,
    ),
    aborts=st.dictionaries(st.integers(0, 60), st.integers(0, 11), max_size=5),
    holds=st.dictionaries(st.integers(0, 40), st.integers(0, 11), max_size=5),
    num_blocks=st.sampled_from([24, 128]),
)
def test_its_accounts_are_those_of_who_is_there_whatever_becomes_of_them(
    requests, aborts, holds, num_blocks
) -> None:
    now = count()
    engine = make_engine(
        options=ScheduleOptions(policy="boost:express_seconds=0.01"),
        num_blocks=num_blocks,
        clock=lambda: next(now) / 1000,
    )
    ids: dict[int, int] = {}
    for step in range(300):
        for index, (prompt, completion, arrival, n, priority_class, timeout_ms) in enumerate(requests):
            if arrival == step:
                params = SamplingParams(max_tokens=completion, n=n, temperature=1.0, seed=index)
                with suppress(DeadlineError):
                    ids[index] = engine.add(
                        [index] * prompt, params, priority_class=priority_class, timeout_ms=timeout_ms
                    )
        if aborts.get(step) in ids:
            engine.abort(ids[aborts[step]])
        if holds.get(step) in ids:
            engine.hold(ids[holds[step]])
        if step == 40:
            for request_id in ids.values():
                engine.hold(request_id, is_held=False)
        if step % 17 == 16:
            engine.set_policy("fcfs")
            engine.set_policy("boost:express_seconds=0.01")
        engine.step()
        check_accounts(engine)


def check_accounts(engine: Engine) -> None:
    policy, live = engine.scheduler.policy, engine.scheduler.sequences
    assert isinstance(policy, Boost)
    ids = {sequence.sequence_id for sequence in live}
    waiting = policy._waiting._orders.keys()
    assert waiting | policy._streams.keys() == ids
    assert not waiting & policy._streams.keys()
    assert len(policy._waiting._entries) == len(waiting)
    on_lane = [*policy._lane, *(sequence_id for short in policy._short.values() for sequence_id in short)]
    assert len(on_lane) == len(set(on_lane))
    assert policy._due.keys() <= ids
    assert waiting >= set(on_lane)
    unbegun = [sequence for sequence in live if not sequence.is_started]
    assert policy._backlog._num_waiting == len(unbegun)
    assert policy._waiting._work_seconds.keys() == {sequence.sequence_id for sequence in unbegun}
    work = sum(sequence.standing.work_seconds for sequence in unbegun)
    assert policy._backlog._work_seconds == pytest.approx(work, abs=1e-9)
    assert engine.scheduler.work._kinds.keys() == ids
