"""Who cannot be in time any more goes behind those that can, and nobody else does."""

from __future__ import annotations

import pytest
from fake_executable import FakeExecutable, LetterDecoder

from fastserve.config import ScheduleOptions
from fastserve.engine.completion import Completion
from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork
from fastserve.engine.engine import Engine
from fastserve.engine.least_time import LeastTime
from fastserve.engine.policy import POLICY_NAMES
from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.relegation import Relegation
from fastserve.engine.sequence import Sequence
from fastserve.types import Batch, Limits, SamplingParams, StepResult

COST = StepCost(fixed_seconds=0.01, prefill_seconds=0.001, decode_seconds=0.0)


class TimedExecutable(FakeExecutable):
    """Steps take a hundredth of a second and a thousandth a row."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def run(self, batch: Batch) -> StepResult:
        self.seconds += 0.01 + 0.001 * batch.num_tokens
        return super().run(batch)


def make(*, max_sequences: int = 2, **options: object) -> tuple[Engine, TimedExecutable]:
    limits = Limits(
        max_tokens=32, max_outputs=max_sequences, max_sequences=max_sequences, num_blocks=256, max_context=256
    )
    executable = TimedExecutable(limits)
    engine = Engine(
        executable,
        eos_token_ids=(),
        make_decoder=LetterDecoder,
        context_length=256,
        options=ScheduleOptions(prefix_cache="off", **options),  # type: ignore[arg-type]
        clock=executable,
    )
    return engine, executable


def finish(engine: Engine) -> dict[int, Completion]:
    done = {}
    for _ in range(5000):
        if not engine.has_work:
            return done
        chunks = engine.step()
        engine.check_invariants()
        done |= {chunk.request_id: chunk.completion for chunk in chunks if chunk.completion is not None}
    raise AssertionError("a sequence is stuck")


def warm_up(engine: Engine) -> None:
    for length in range(1, 40, 3):
        engine.add([1] * length, SamplingParams(max_tokens=6, ignore_eos=True))
    finish(engine)


def exactly(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def relegation(*, fitted: bool = True, **options: float) -> Relegation:
    cost = OnlineStepCost(COST)
    for n in range(32 if fitted else 0):
        work = StepWork(prefill_tokens=n)
        cost.observe(work, COST.seconds(work))
    return Relegation(LeastTime(ExpectedWork(cost), chunk_tokens=64), **options)


def sequence_of(prompt: int, params: SamplingParams, *, deadline: float | None = None) -> Sequence:
    return Sequence(
        sequence_id=0,
        token_ids=[1] * prompt,
        num_prompt_tokens=prompt,
        max_tokens=params.max_tokens or 1000,
        params=params,
        arrival_seconds=0.0,
        deadline_seconds=deadline,
    )


@pytest.mark.parametrize(
    ("params", "deadline", "is_hopeless"),
    [
        (exactly(100), 2.0, False),  # a second of steps
        (exactly(100), 0.5, True),
        (SamplingParams(max_tokens=100), 0.5, False),  # it may end at once
        (SamplingParams(max_tokens=100), 0.05, True),  # not before its prompt is read
        (exactly(100), None, False),
    ],
)
def test_a_deadline_that_cannot_be_kept_at_the_speed_of_the_steps_relegates(params, deadline, is_hopeless):
    sequence = sequence_of(100, params, deadline=deadline)
    chooser = relegation()
    chooser.refresh([sequence], 0.0)
    assert sequence.is_relegated is chooser.has_any is is_hopeless


def test_before_steps_have_been_seen_nobody_is_relegated() -> None:
    sequence = sequence_of(100, exactly(100), deadline=0.01)
    relegation(fitted=False).refresh([sequence], 0.0)
    assert not sequence.is_relegated


def test_an_objective_relegates_until_the_first_token_and_no_longer() -> None:
    sequence = sequence_of(100, SamplingParams())
    chooser = relegation(first_token_seconds=1.0)
    chooser.refresh([sequence], 0.5)
    assert not sequence.is_relegated
    chooser.refresh([sequence], 0.95)  # its prompt takes a tenth
    assert sequence.is_relegated
    sequence.token_ids.append(1)
    sequence.num_computed_tokens = 100
    chooser.refresh([sequence], 1.2)
    assert not sequence.is_relegated


def test_who_is_hopeless_yields_to_those_that_can_be_in_time_and_uses_what_they_leave() -> None:
    engine, _ = make(policy="fcfs")
    warm_up(engine)
    hopeless = [engine.add([index] * 8, exactly(200), timeout_ms=3000) for index in (1, 2)]
    engine.step()
    for sequence in engine.scheduler.sequences:
        assert sequence.deadline_seconds is not None
        sequence.deadline_seconds -= 1.5  # the machine has become slower than it was
    in_time = [engine.add([index] * 8, exactly(40), timeout_ms=1200) for index in (3, 4)]
    done = finish(engine)
    assert [done[request].has_expired for request in in_time] == [False, False]
    assert [request for request in done if request >= hopeless[0]] == [*in_time, *hopeless]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_under_overload_no_fewer_are_in_time_than_without(policy, monkeypatch) -> None:
    def num_in_time() -> int:
        engine, executable = make(policy=policy, max_sequences=4)
        warm_up(engine)
        arrivals = [executable.seconds + 0.1 * index for index in range(80)]
        done: dict[int, Completion] = {}
        while arrivals or engine.has_work:
            while arrivals and (not engine.has_work or arrivals[0] <= executable.seconds):
                executable.seconds = max(executable.seconds, arrivals.pop(0))
                tokens = 20 + 40 * (len(arrivals) % 2)
                # It may end with any token, as far as the engine knows, but does not.
                params = SamplingParams(max_tokens=tokens, stop_token_ids=[96 + 10**6])
                engine.add([len(arrivals)] * 8, params, timeout_ms=900 + 400 * (len(arrivals) % 2))
            chunks = engine.step()
            done |= {c.request_id: c.completion for c in chunks if c.completion is not None}
        return sum(not completion.has_expired for completion in done.values())

    with_relegation = num_in_time()
    monkeypatch.setattr(Relegation, "refresh", lambda *_: None)
    assert with_relegation >= num_in_time()


def test_relegation_takes_nothing_from_another_tenant() -> None:
    engine, _ = make(max_sequences=1, policy="fcfs", first_token_seconds=0.05)
    warm_up(engine)
    for tenant in ("late", "early"):
        for _ in range(3):
            engine.add([5] * 40, exactly(10), tenant=tenant)
    for sequence in engine.scheduler.sequences:
        if sequence.tenant == "late":
            sequence.arrival_seconds -= 10.0
    tenants = {}
    while engine.has_work:
        for chunk in engine.step():
            tenants.setdefault(chunk.request_id, None)
    assert len(tenants) == 6
