"""The most blocks that sequences are expected to own at once, and who is let in by it."""

from __future__ import annotations

import itertools

import pytest
from fake_executable import make_engine
from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.engine import Engine
from fastserve.engine.peak import Peak
from fastserve.types import SamplingParams

BLOCK_SIZE = 10


def peak_of(sequences: list[tuple[int, int]]) -> Peak:
    peak = Peak(BLOCK_SIZE)
    for tokens_left, num_blocks in sequences:
        peak.add(tokens_left, num_blocks)
    return peak


def simulated_peak(sequences: list[tuple[int, int]]) -> int:
    """Token by token."""
    moments = range(1 + max(left for left, _ in sequences))
    return max(
        sum(blocks - (-moment // BLOCK_SIZE) for left, blocks in sequences if left >= moment)
        for moment in moments
    )


SEQUENCES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=8)


@given(SEQUENCES)
def test_the_peak_is_that_of_the_sequences_run_token_by_token(sequences) -> None:
    assert peak_of(sequences).num_blocks == simulated_peak(sequences)


@given(SEQUENCES, st.integers(1, 60), st.integers(1, 9))
def test_the_peak_with_one_more_is_that_after_it_is_added(sequences, tokens_left, num_blocks) -> None:
    peak = peak_of(sequences)
    before = peak.num_blocks
    with_one_more = peak.num_blocks_with(tokens_left, num_blocks)
    assert peak.num_blocks == before, "asking changes nothing"
    peak.add(tokens_left, num_blocks)
    assert peak.num_blocks == with_one_more
    assert with_one_more >= before


def test_blocks_that_sequences_share_count_once_and_held_ones_stay() -> None:
    peak = peak_of([(10, 4), (10, 4)])
    peak.num_shared = 3
    assert peak.num_blocks == 4 + 4 + 2 - 3
    peak.add(0, 7, is_lasting=True)
    assert peak.num_blocks == 4 + 4 + 2 - 3 + 7


def make(*, peak_quantile: float, num_blocks: int = 40) -> Engine:
    options = ScheduleOptions(policy="fcfs", peak_quantile=peak_quantile, prefix_cache="off")
    ticks = itertools.count()  # guards look at the clock: runs are to be the same again
    return make_engine(options=options, num_blocks=num_blocks, clock=lambda: 0.001 * next(ticks))


def teach(engine: Engine, num_tokens: int) -> None:
    """Let completions of so many tokens end."""
    for index in range(80):
        engine.add([index % 90], SamplingParams(max_tokens=num_tokens))
        if index % 4 == 3:
            while engine.has_work:
                engine.step()


def run(engine: Engine, num_requests: int, *, prompt_tokens: int, num_tokens: int) -> tuple[int, int]:
    """The most that ran at once, and evictions."""
    for index in range(num_requests):
        engine.add([index] * prompt_tokens, SamplingParams(max_tokens=num_tokens, seed=index))
    most = num_steps = 0
    before = engine.status().residency.evictions
    while engine.has_work:
        engine.step()
        engine.check_invariants()
        most = max(most, engine.status().num_resident)
        num_steps += 1
        assert num_steps < 5000
    return most, engine.status().residency.evictions - before


def test_where_lengths_are_known_nobody_is_evicted_for_lack_of_blocks() -> None:
    evictions = {}
    for quantile in (0.0, 0.5):
        engine = make(peak_quantile=quantile)
        teach(engine, 60)
        most, evictions[quantile] = run(engine, 12, prompt_tokens=12, num_tokens=60)
        assert most >= 2
    assert evictions[0.0] > 0
    assert evictions[0.5] == 0


def test_where_nothing_is_known_of_lengths_whoever_fits_now_is_let_in() -> None:
    results = [run(make(peak_quantile=q), 8, prompt_tokens=12, num_tokens=60) for q in (0.0, 0.5)]
    assert results[0] == results[1]


def test_a_reader_that_is_behind_keeps_nobody_out() -> None:
    engine = make(peak_quantile=0.5)
    teach(engine, 60)
    held = engine.add([1] * 60, SamplingParams(max_tokens=60))
    for _ in range(30):
        engine.step()
    engine.hold(held)
    newcomer = engine.add([2] * 50, SamplingParams(max_tokens=60))
    for _ in range(100):
        engine.step()
        engine.check_invariants()
    assert not engine.is_running(newcomer)
    engine.hold(held, is_held=False)
    while engine.has_work:
        engine.step()


def test_of_readers_that_are_behind_the_last_in_order_gives_way() -> None:
    engine = make(peak_quantile=0.5)
    teach(engine, 60)
    held = [engine.add([index] * 10, SamplingParams(max_tokens=60)) for index in range(2)]
    for _ in range(30):
        engine.step()
    first, last = engine.scheduler.sequences
    assert first.is_resident
    assert last.is_resident
    for request_id in held:
        engine.hold(request_id)
    engine.add([2] * 60, SamplingParams(max_tokens=60))
    for _ in range(3):
        engine.step()
    assert first.is_resident
    assert not last.is_resident


def test_a_reader_that_is_behind_keeps_its_blocks_where_they_would_not_help() -> None:
    engine = make(peak_quantile=0.5)
    teach(engine, 60)
    held = engine.add([1] * 8, SamplingParams(max_tokens=60))
    for _ in range(2):
        engine.step()
    engine.hold(held)
    reader = engine.scheduler.sequences[0]
    for index in range(3):
        engine.add([index] * 60, SamplingParams(max_tokens=60))
    for _ in range(3):
        engine.step()
    assert engine.status().num_waiting > 0
    assert reader.is_resident


def test_one_that_is_expected_to_outgrow_the_pool_runs_alone() -> None:
    engine = make(peak_quantile=0.99, num_blocks=8)
    teach(engine, 31)
    most, _ = run(engine, 3, prompt_tokens=24, num_tokens=8)
    assert most == 1


def test_short_completions_are_let_in_together_where_long_ones_are_not() -> None:
    most = {}
    for num_tokens in (4, 60):
        engine = make(peak_quantile=0.5)
        teach(engine, num_tokens)
        most[num_tokens], _ = run(engine, 8, prompt_tokens=12, num_tokens=num_tokens)
    assert most[4] > most[60]


def test_a_prefix_that_many_share_does_not_keep_others_out() -> None:
    options = ScheduleOptions(policy="fcfs", peak_quantile=0.5)
    engine = make_engine(options=options, num_blocks=40)
    teach(engine, 4)
    engine.add([7] * 100, SamplingParams(max_tokens=4))
    while engine.has_work:
        engine.step()
    for _ in range(6):
        engine.add([7] * 100, SamplingParams(max_tokens=4))
    engine.step()
    engine.step()
    assert engine.status().num_resident >= 4


def test_what_is_learned_of_lengths_outlives_a_change_of_policy() -> None:
    engine = make(peak_quantile=0.5)
    teach(engine, 30)
    for policy in ("boost", "gittins", "fcfs", "boost"):
        engine.set_policy(policy)
    engine.add([1], SamplingParams(max_tokens=100))
    (sequence,) = engine.scheduler.sequences
    assert engine.scheduler.work.lengths(sequence).mean_left(0) == pytest.approx(30)
