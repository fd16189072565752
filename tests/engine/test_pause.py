"""How long streams may be paused in all, and that nobody is paused beyond that for one who may be."""

from __future__ import annotations

import pytest
from fake_executable import FakeExecutable, LetterDecoder
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.engine import Engine
from fastserve.engine.pause import PauseBudget
from fastserve.engine.policy import POLICY_NAMES
from fastserve.engine.sequence import Sequence
from fastserve.types import Batch, Limits, SamplingParams, StepResult

STEP_SECONDS = 0.02
CHECK_SECONDS = 0.05
PREEMPTIVE = [name for name in POLICY_NAMES if name != "mlfq-published"]


class TimedExecutable(FakeExecutable):
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def run(self, batch: Batch) -> StepResult:
        self.seconds += STEP_SECONDS
        return super().run(batch)


def make(policy: str, *, max_sequences: int = 3, **options: object) -> tuple[Engine, TimedExecutable]:
    limits = Limits(
        max_tokens=64, max_outputs=max_sequences, max_sequences=max_sequences, num_blocks=512, max_context=256
    )
    executable = TimedExecutable(limits)
    engine = Engine(
        executable,
        eos_token_ids=(),
        make_decoder=LetterDecoder,
        context_length=256,
        options=ScheduleOptions(policy=policy, prefix_cache="off", **options),  # type: ignore[arg-type]
        clock=executable,
    )
    return engine, executable


def params_of(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def step_with_a_slow_reader(engine: Engine, request_id: int) -> None:
    """5 steps; 100, in which its reader is behind; 5."""
    for step in range(110):
        if step in (5, 105):
            engine.hold(request_id, is_held=step == 5)
        engine.step()


def flood(policy: str, budget: float | None, *, num_short: int = 120) -> tuple[float, float]:
    """A long stream among ever new short ones on three places: its longest gap, and its pauses in all."""
    engine, executable = make(policy, pause_budget_seconds=budget)
    stream = engine.add([1] * 60, params_of(100))
    last: float | None = None
    longest = paused = 0.0
    for step in range(3000):
        if step % 2 == 1 and step // 2 < num_short:
            engine.add([2], params_of(6))
        for chunk in engine.step():
            if chunk.request_id == stream:
                if last is not None:
                    longest = max(longest, executable.seconds - last)
                    paused += executable.seconds - last - STEP_SECONDS
                last = executable.seconds
        engine.check_invariants()
        if not engine.is_running(stream):
            return longest, paused
    raise AssertionError("the stream has starved")


@pytest.mark.parametrize("policy", PREEMPTIVE)
@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0])
def test_a_streams_pauses_keep_the_budget_in_all_and_its_longest_gap_too(policy, budget) -> None:
    longest, paused = flood(policy, budget)
    bound = budget + CHECK_SECONDS + 2 * STEP_SECONDS
    assert paused <= bound
    assert longest <= bound


def test_without_a_budget_the_same_flood_pauses_it_for_longer() -> None:
    assert flood("sjf", None)[1] > 1.0 + CHECK_SECONDS + 2 * STEP_SECONDS


@settings(deadline=None, max_examples=80)
@given(
    policy=st.sampled_from(PREEMPTIVE),
    sizes=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 40)), min_size=4, max_size=24
    ),
    budget=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_nobody_whose_budget_is_spent_is_passed_over_for_one_whose_is_not(policy, sizes, budget) -> None:
    engine, _ = make(policy, pause_budget_seconds=budget)
    for step in range(4000):
        for prompt, length, arrival in sizes:
            if arrival == step:
                engine.add([step] * prompt, params_of(length))
        sequences = list(engine.scheduler.sequences)
        insistent = {s.sequence_id for s in sequences if s.is_insistent and s.is_resident}
        chunks = engine.step()
        served = {chunk.request_id for chunk in chunks}
        if insistent - served:
            assert served <= insistent | {s.sequence_id for s in sequences if s.is_insistent}
        if step > 40 and not engine.has_work:
            break
    assert not engine.has_work


def test_what_a_slow_reader_makes_a_stream_wait_is_no_pause() -> None:
    engine, _ = make("fcfs", pause_budget_seconds=0.5)
    stream = engine.add([1] * 4, params_of(50))
    engine.add([2] * 4, params_of(200))
    step_with_a_slow_reader(engine, stream)
    sequence = next(s for s in engine.scheduler.sequences if s.sequence_id == stream)
    assert sequence.num_completion_tokens == 10
    assert sequence.paused_seconds == 0.0
    assert not sequence.is_insistent


def test_steps_that_follow_each_other_pause_nobody_however_late_they_begin() -> None:
    budget = PauseBudget(0.5)
    sequence = Sequence(
        sequence_id=0, token_ids=[1], num_prompt_tokens=1, max_tokens=100, arrival_seconds=0.0
    )
    now = 0.0
    for _ in range(50):
        now += 0.1  # others' work between two steps
        budget.refresh([sequence], now)
        now += STEP_SECONDS
        budget.give([sequence], STEP_SECONDS, now)
    assert sequence.paused_seconds == 0.0
    assert not budget.has_any


def test_a_beam_that_waits_for_its_siblings_is_not_paused() -> None:
    # The stream leaves two places for three beams: one of them has its turn a step after the others.
    engine, _ = make("fcfs", pause_budget_seconds=0.1)
    engine.add([2], params_of(200))
    engine.add([1] * 4, SamplingParams(max_tokens=40, num_beams=3))
    for _ in range(40):
        engine.step()
        engine.check_invariants()
    beams = [s for s in engine.scheduler.sequences if s.num_candidates]
    assert 15 <= beams[0].num_completion_tokens <= 21
    assert [(beam.paused_seconds, beam.is_insistent) for beam in beams] == [(0.0, False)] * 3


def test_beams_that_are_all_paused_are_so_once_however_they_branch() -> None:
    engine, executable = make("priority")
    engine.add([1] * 4, SamplingParams(max_tokens=60, num_beams=3))
    for _ in range(10):
        engine.step()
    others = [engine.add([2], params_of(20), priority=-1) for _ in range(3)]
    began = executable.seconds
    while any(map(engine.is_running, others)):
        engine.step()
    paused = executable.seconds - began
    for _ in range(10):
        engine.step()
    beams = list(engine.scheduler.sequences)
    assert len(beams) == 3
    assert [beam.paused_seconds for beam in beams] == [pytest.approx(paused, abs=1.5 * STEP_SECONDS)] * 3


def test_what_a_slow_reader_makes_beams_wait_is_no_pause() -> None:
    engine, _ = make("fcfs", pause_budget_seconds=0.5)
    search = engine.add([1] * 4, SamplingParams(max_tokens=50, num_beams=2))
    engine.add([2] * 4, params_of(200))
    step_with_a_slow_reader(engine, search)
    beams = [s for s in engine.scheduler.sequences if s.num_candidates]
    assert len(beams) == 2
    assert [(s.paused_seconds, s.is_insistent) for s in beams] == [(0.0, False)] * 2
