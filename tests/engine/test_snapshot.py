"""Snapshots: what they say is what the engine has done, and taking them changes nothing."""

from __future__ import annotations

import time

from fake_executable import FakeExecutable, LetterDecoder
from fake_mover import Clock, SlowMover
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.engine import Engine
from fastserve.engine.policy import POLICY_NAMES
from fastserve.engine.snapshot import MOST_SEQUENCES
from fastserve.types import Limits, SamplingParams


def make(
    policy: str = "fcfs", *, num_blocks: int = 16, slow_blocks: int = 0, max_sequences: int = 6
) -> Engine:
    limits = Limits(
        max_tokens=24,
        max_outputs=max_sequences,
        max_sequences=max_sequences,
        num_blocks=num_blocks,
        max_context=64,
    )
    executable = FakeExecutable(limits, block_size=4)
    return Engine(
        executable,
        eos_token_ids=(),
        make_decoder=LetterDecoder,
        context_length=64,
        options=ScheduleOptions(policy=policy, priority_classes=("urgent", "batch"), default_class="batch"),
        mover=SlowMover(executable, slow_blocks, cost=1e-6) if slow_blocks else None,
        clock=Clock(),
    )


def prompt_of(length: int, *, family: int) -> list[int]:
    return [(family * 31 + position) % 97 for position in range(length)]


def states(engine: Engine) -> dict[int, str]:
    return {sequence.id: sequence.state for sequence in engine.snapshot().sequences}


def test_an_engine_that_has_done_nothing_has_an_empty_snapshot() -> None:
    snapshot = make("mlfq:growth=4").snapshot()
    assert (snapshot.policy, snapshot.policy_spec) == ("mlfq", "mlfq:growth=4")
    assert (snapshot.num_sequences, snapshot.num_unstarted, snapshot.sequences) == (0, 0, [])
    assert (snapshot.blocks.fast.total, snapshot.blocks.fast.used, snapshot.blocks.slow.total) == (16, 0, 0)
    assert snapshot.totals.steps == 0
    assert snapshot.step_seconds is None


def test_sequences_are_described_in_the_order_of_their_turns() -> None:
    engine = make("priority", num_blocks=64)
    engine.add(prompt_of(30, family=1), SamplingParams(max_tokens=9), priority=2, tenant="bob")
    engine.step()  # 24 of its 30 tokens
    engine.add([5], SamplingParams(max_tokens=4), priority=1, tenant="ann", name="mine")
    snapshot = engine.snapshot()
    first, second = snapshot.sequences
    assert (first.id, first.request_id, first.tenant, first.place, first.state) == (
        1,
        "mine",
        "ann",
        0,
        "waiting",
    )
    assert (second.id, second.request_id, second.tenant, second.place, second.state) == (
        0,
        "0",
        "bob",
        1,
        "running",
    )
    assert (second.prompt_tokens, second.computed_tokens, second.completion_tokens) == (30, 24, 0)
    assert (second.max_tokens, second.blocks) == (9, 8)
    assert second.attained_seconds > 0
    assert second.age_seconds >= second.attained_seconds
    assert (snapshot.num_sequences, snapshot.num_unstarted) == (2, 1)
    assert snapshot.totals.prompt_tokens == 24
    assert snapshot.blocks.fast.used == 8


def test_totals_count_what_steps_have_done() -> None:
    engine = make(num_blocks=64)
    engine.add(prompt_of(10, family=1), SamplingParams(max_tokens=5, n=2, temperature=1.0))
    engine.add(prompt_of(7, family=2), SamplingParams(max_tokens=3))
    num_steps = 0
    while engine.has_work:
        num_steps += bool(engine.step())
    totals = engine.snapshot().totals
    assert (totals.prompt_tokens, totals.completion_tokens, totals.completions) == (17, 13, 3)
    assert totals.steps == num_steps
    engine.add(prompt_of(10, family=1), SamplingParams(max_tokens=1))
    engine.step()
    again = engine.snapshot()
    assert again.totals.prompt_tokens == 17 + 2  # two blocks of four were found
    assert (again.prefix_tokens.hit, again.prefix_tokens.miss) == (8, 19)


def test_who_takes_memory_is_named_with_whom_it_is_taken_from() -> None:
    engine = make("priority", num_blocks=16, slow_blocks=32)
    victim = engine.add(prompt_of(40, family=1), SamplingParams(max_tokens=24), priority=1, tenant="bob")
    for _ in range(12):
        engine.step()
    better = engine.add(prompt_of(40, family=2), SamplingParams(max_tokens=8), priority=0)
    before = time.time()
    while not (preempted := engine.snapshot().recent_preemptions):
        engine.step()
    (preemption,) = preempted
    assert (preemption.sequence_id, preemption.tenant) == (victim, "bob")
    assert (preemption.reason, preemption.by) == ("evicted", better)
    assert abs(preemption.time - before) < 60
    assert engine.snapshot().recent_preemptions == preempted  # its time too
    assert engine.snapshot().preemptions == {"evicted": 1, "passed_over": 0}
    seen = {states(engine)[victim]}
    while engine.has_work:
        engine.step()
        seen.add(states(engine).get(victim, "over"))
    assert seen >= {"moving", "slow", "running", "over"}


def test_who_has_the_turn_of_one_that_is_passed_over_is_named() -> None:
    engine = make("priority", num_blocks=64, max_sequences=2)
    ids = [engine.add([n], SamplingParams(max_tokens=9), priority=1) for n in range(2)]
    engine.step()
    better = engine.add([7], SamplingParams(max_tokens=2), priority=0)
    engine.step()
    (preemption,) = engine.snapshot().recent_preemptions
    assert (preemption.sequence_id, preemption.reason, preemption.by) == (ids[1], "passed_over", better)
    assert states(engine) == {better: "running", ids[0]: "running", ids[1]: "paused"}


def test_a_request_whose_reader_is_behind_is_held() -> None:
    engine = make()
    request = engine.add([1], SamplingParams(max_tokens=9))
    engine.step()
    engine.hold(request)
    assert states(engine) == {request: "held"}


def test_a_snapshot_has_the_first_of_very_many_sequences() -> None:
    engine = make()
    for _ in range(MOST_SEQUENCES + 9):
        engine.add([1], SamplingParams(max_tokens=2), priority_class="batch")
    urgent = engine.add([1], SamplingParams(max_tokens=2), priority_class="urgent")
    snapshot = engine.snapshot()
    assert snapshot.num_sequences == MOST_SEQUENCES + 10
    assert len(snapshot.sequences) == MOST_SEQUENCES
    assert (snapshot.sequences[0].id, snapshot.sequences[0].priority_class) == (urgent, "urgent")
    assert [s.place for s in snapshot.sequences] == list(range(MOST_SEQUENCES))


def test_the_policy_is_named_with_the_knobs_that_it_was_given() -> None:
    engine = make()
    engine.set_policy("boost:strength=2")
    snapshot = engine.snapshot()
    assert (snapshot.policy, snapshot.policy_spec) == ("boost", "boost:strength=2")


@settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 40),  # prompt tokens
            st.integers(1, 24),  # completion tokens
            st.integers(1, 3),  # completions
            st.integers(0, 25),  # step of its arrival
            st.integers(0, 2),  # priority, tenant
        ),
        min_size=1,
        max_size=12,
    ),
    policy=st.sampled_from(POLICY_NAMES),
    slow_blocks=st.sampled_from([0, 40]),
)
def test_snapshots_agree_with_the_engine_and_change_nothing(requests, policy, slow_blocks) -> None:
    watched, alone = (make(policy, num_blocks=24, slow_blocks=slow_blocks) for _ in range(2))
    for step in range(3000):
        for index, (prompt, length, n, arrival, priority) in enumerate(requests):
            if arrival == step:
                for engine in (watched, alone):
                    engine.add(
                        prompt_of(prompt, family=priority),
                        SamplingParams(max_tokens=length, temperature=1.0, seed=index, n=n),
                        priority=priority,
                        tenant=str(priority),
                    )
        chunks = watched.step()
        assert [(c.request_id, c.index, c.token_id) for c in chunks] == [
            (c.request_id, c.index, c.token_id) for c in alone.step()
        ]
        snapshot, status = watched.snapshot(), alone.status()
        alone._clock()  # the test's clock ticks whenever it is read
        assert snapshot.num_sequences == len(alone.scheduler.sequences)
        assert snapshot.blocks.fast.used == status.num_blocks - status.num_free_blocks
        assert snapshot.blocks.slow.used == status.num_slow_blocks_used
        assert sum(snapshot.preemptions.values()) == status.num_preemptions
        assert len(snapshot.recent_preemptions) == min(status.num_preemptions, 64)
        assert all(p.by != p.sequence_id for p in snapshot.recent_preemptions)
        in_slow = sum(s.state in ("slow", "moving") for s in snapshot.sequences)
        assert in_slow == status.num_slow
        watched.check_invariants()
        if step > 30 and not watched.has_work:
            break
    assert not alone.has_work
    lengths = sum(length * n for _, length, n, _, _ in requests)
    assert watched.snapshot().totals.completion_tokens == lengths
