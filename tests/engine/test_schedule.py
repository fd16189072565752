"""The scheduler under random streams: a fake clock, a fake executable whose tokens hash what the blocks hold,
and a slow tier that takes its time."""

from __future__ import annotations

import pytest
from fake_executable import FakeExecutable, LetterDecoder, fake_adapter, plain_loop
from fake_mover import Clock, SlowMover
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.completion import Completion
from fastserve.engine.engine import Engine
from fastserve.engine.policy import POLICY_NAMES
from fastserve.engine.sequence import Residence
from fastserve.errors import OptionError
from fastserve.types import Limits, SamplingParams


def make(
    *,
    policy: str = "fcfs",
    num_blocks: int = 16,
    slow_blocks: int = 0,
    move_cost: float = 1e-5,
    **options: object,
) -> tuple[Engine, SlowMover | None]:
    limits = Limits(
        max_tokens=24,
        max_outputs=6,
        max_sequences=6,
        num_blocks=num_blocks,
        max_context=64,
        num_adapter_slots=2,
    )
    executable = FakeExecutable(limits, block_size=4)
    mover = SlowMover(executable, slow_blocks, cost=move_cost) if slow_blocks else None
    engine = Engine(
        executable,
        eos_token_ids=(),
        make_decoder=LetterDecoder,
        context_length=64,
        options=ScheduleOptions(policy=policy, **options),
        mover=mover,
        clock=Clock(),
    )
    return engine, mover


def finish(engine: Engine, *, most_steps: int = 3000) -> dict[tuple[int, int], Completion]:
    """Step until there is no work, checking invariants; the completions by request_id and index."""
    done = {}
    for _ in range(most_steps):
        if not engine.has_work:
            assert engine.pool.num_free == engine.pool.num_blocks
            return done
        chunks = engine.step()
        engine.check_invariants()
        done |= {(c.request_id, c.index): c.completion for c in chunks if c.completion is not None}
    raise AssertionError("a sequence is stuck")


def tokens_of(prompt: list[int], params: SamplingParams, *, rank: int = 0) -> list[int]:
    return plain_loop(prompt, params, params.max_tokens or 0, rank=rank)


def prompt_of(length: int, *, family: int) -> list[int]:
    """Prompts of one family begin alike."""
    return [(family * 31 + position) % 97 for position in range(length)]


requests = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt tokens
        st.integers(1, 24),  # completion tokens
        st.integers(0, 2),  # family of the prompt
        st.integers(1, 3),  # completions
        st.integers(0, 25),  # step of its arrival
        st.integers(0, 2),  # priority, and tenant
        st.integers(-2, 4),  # rank of its adapter, of which each has another; up to 0: none
    ),
    min_size=1,
    max_size=16,
)


@settings(deadline=None, max_examples=150)
@given(
    requests=requests,
    aborts=st.dictionaries(st.integers(0, 60), st.integers(0, 15), max_size=5),
    holds=st.dictionaries(st.integers(0, 40), st.integers(0, 15), max_size=3),
    policies=st.lists(st.sampled_from(POLICY_NAMES), min_size=1, max_size=3),
    num_blocks=st.integers(16, 40),
    slow_blocks=st.sampled_from([0, 3, 40]),
    move_cost=st.sampled_from([1e-6, 1.0]),
    prefix_cache=st.sampled_from(["lru", "lfu", "off"]),
    fails=st.booleans(),
)
def test_preempted_moved_dropped_and_forked_sequences_get_the_tokens_of_the_plain_loop(
    requests, aborts, holds, policies, num_blocks, slow_blocks, move_cost, prefix_cache, fails
) -> None:
    engine, mover = make(
        policy=policies[0],
        num_blocks=num_blocks,
        slow_blocks=slow_blocks,
        move_cost=move_cost,
        prefix_cache=prefix_cache,
    )
    adapters = {rank: fake_adapter(rank) for rank in range(1, 5)}  # more than there are slots
    ids: dict[int, int] = {}  # index of a request -> request_id
    done: dict[tuple[int, int], Completion] = {}
    for step in range(4000):
        for index, (prompt, length, family, n, arrival, priority, rank) in enumerate(requests):
            if arrival == step:
                params = SamplingParams(max_tokens=length, temperature=1.0, seed=index, n=n)
                ids[index] = engine.add(
                    prompt_of(prompt, family=family),
                    params,
                    priority=priority,
                    tenant=str(priority),
                    adapter=adapters.get(rank),
                )
        if aborts.get(step) in ids:
            engine.abort(ids[aborts[step]])
        if holds.get(step) in ids:
            engine.hold(ids[holds[step]])
        if step == 50:
            for request_id in ids.values():
                engine.hold(request_id, is_held=False)
        if mover is not None:
            mover.fails = fails and step % 3 == 0
        if step % 7 == 6:
            engine.set_policy(policies[step // 7 % len(policies)])
        for chunk in engine.step():
            if chunk.completion is not None:
                assert (chunk.request_id, chunk.index) not in done
                done[chunk.request_id, chunk.index] = chunk.completion
        engine.check_invariants()
        if step > 60 and not engine.has_work:
            break
    assert engine.pool.num_free == num_blocks
    for index, (prompt, length, family, n, _, _, rank) in enumerate(requests):
        for i in range(n):
            completion = done.get((ids[index], i))
            if completion is None:
                assert index in aborts.values()
                continue
            params = SamplingParams(max_tokens=length, temperature=1.0, seed=index + i)
            expected = tokens_of(prompt_of(prompt, family=family), params, rank=max(rank, 0))
            assert list(completion.token_ids) == expected


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_step_has_work_while_anybody_can_run(policy: str) -> None:
    engine, _ = make(policy=policy)
    for length in (40, 3, 17, 30, 1, 22):
        engine.add(prompt_of(length, family=length), SamplingParams(max_tokens=20))
    while engine.has_work:
        num_steps = len(engine._executable.batches)
        engine.step()
        assert len(engine._executable.batches) == num_steps + 1


def test_a_prompt_that_begins_as_an_earlier_one_computes_only_the_rest() -> None:
    engine, _ = make(num_blocks=32)
    engine.add(prompt_of(30, family=1), SamplingParams(max_tokens=4))
    finish(engine)
    engine.add(prompt_of(34, family=1), SamplingParams(max_tokens=1))
    engine.step()
    assert engine._executable.batches[-1].num_tokens == 34 - 28
    finish(engine)
    assert engine.scheduler.residency.counters.prefix_tokens == 28


def test_a_conversation_that_goes_on_finds_its_completion_in_the_cache_too() -> None:
    engine, _ = make(num_blocks=32)
    prompt = prompt_of(10, family=1)
    engine.add(prompt, SamplingParams(max_tokens=14))
    ((_, completion),) = finish(engine).items()
    engine.add([*prompt, *completion.token_ids, 1, 2], SamplingParams(max_tokens=1))
    finish(engine)
    assert engine.scheduler.residency.counters.prefix_tokens == 20


@pytest.mark.parametrize(("share_prefixes", "found"), [("tenant", 0), ("all", 28)])
def test_prefixes_are_shared_between_tenants_only_where_that_is_asked_for(share_prefixes, found) -> None:
    engine, _ = make(num_blocks=32, share_prefixes=share_prefixes)
    for tenant in ("one", "other"):
        engine.add(prompt_of(30, family=1), SamplingParams(max_tokens=1), tenant=tenant)
        finish(engine)
    assert engine.scheduler.residency.counters.prefix_tokens == found


def test_completions_of_one_prompt_share_its_blocks_and_copy_only_the_last() -> None:
    engine, _ = make(num_blocks=32)
    request = engine.add(prompt_of(30, family=1), SamplingParams(max_tokens=2, n=3, temperature=1.0, seed=5))
    while engine.pool.num_free == 32 or not all(s.num_completion_tokens for s in engine.scheduler.sequences):
        engine.step()
    assert engine.pool.num_free == 32 - 8
    engine.step()
    done = finish(engine)
    assert not done
    assert sum(batch.num_tokens for batch in engine._executable.batches) == 30 + 3
    assert request == 0


def test_under_pressure_the_last_to_come_yields_and_loses_nothing() -> None:
    engine, _ = make(num_blocks=16)
    for family in range(3):
        engine.add(prompt_of(16, family=family), SamplingParams(max_tokens=24))
    done = finish(engine)
    assert list(done) == [(0, 0), (1, 0), (2, 0)]
    assert engine.scheduler.residency.counters.evictions > 0
    for family in range(3):
        assert list(done[family, 0].token_ids) == tokens_of(
            prompt_of(16, family=family), SamplingParams(max_tokens=24)
        )


@pytest.mark.parametrize(("move_cost", "moves"), [(1e-7, True), (10.0, False)])
def test_what_is_cheaper_to_move_is_moved_and_what_is_cheaper_to_compute_is_dropped(move_cost, moves) -> None:
    engine, _ = make(num_blocks=16, slow_blocks=32, move_cost=move_cost, prefix_cache="off")
    for family in range(3):
        engine.add(prompt_of(16, family=family), SamplingParams(max_tokens=24))
    finish(engine)
    counters = engine.scheduler.residency.counters
    assert (counters.blocks_out > 0, counters.dropped_tokens > 0) == (moves, not moves)
    assert counters.blocks_in == counters.blocks_out


def test_a_better_priority_takes_memory_and_a_worse_one_waits_for_it() -> None:
    for priorities, first in (((1, 0), 1), ((0, 1), 0), ((0, 0), 0)):
        engine, _ = make(policy="priority", num_blocks=16, slow_blocks=32, move_cost=1e-6)
        engine.add(prompt_of(40, family=1), SamplingParams(max_tokens=24), priority=priorities[0])
        for _ in range(12):
            engine.step()
        engine.add(prompt_of(40, family=2), SamplingParams(max_tokens=8), priority=priorities[1])
        assert next(iter(finish(engine)))[0] == first


def test_an_aborted_sequence_gives_back_what_is_on_the_way() -> None:
    for wanted in (Residence.LEAVING, Residence.SLOW, Residence.ARRIVING):
        engine, _ = make(num_blocks=16, slow_blocks=32, prefix_cache="off")
        ids = [engine.add(prompt_of(16, family=family), SamplingParams(max_tokens=24)) for family in range(3)]
        moved = engine.scheduler.sequences[1]
        while moved.residence is not wanted:
            assert engine.has_work
            engine.step()
        engine.abort(ids[1])
        engine.check_invariants()
        assert (ids[1], 0) not in finish(engine)


def test_a_held_request_has_no_turn_and_goes_on_when_it_is_let_go() -> None:
    engine, _ = make(num_blocks=32)
    held = engine.add(prompt_of(8, family=1), SamplingParams(max_tokens=6))
    engine.step()
    engine.hold(held)
    other = engine.add(prompt_of(8, family=2), SamplingParams(max_tokens=6))
    assert {chunk.request_id for _ in range(6) for chunk in engine.step()} == {other}
    assert engine.step() == []
    engine.hold(held, is_held=False)
    assert list(finish(engine)) == [(held, 0)]


def test_shortest_first_lets_a_short_prompt_overtake_a_long_one_that_waits() -> None:
    for policy, first in (("fcfs", 1), ("sjf", 2)):
        engine, _ = make(policy=policy, num_blocks=16)
        engine.add(prompt_of(40, family=0), SamplingParams(max_tokens=8))
        engine.step()
        engine.add(prompt_of(40, family=1), SamplingParams(max_tokens=20))
        engine.add(prompt_of(3, family=2), SamplingParams(max_tokens=2))
        starts = [chunk.request_id for _ in range(60) for chunk in engine.step() if chunk.request_id]
        assert starts[0] == first


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lifo", "policy 'lifo' is unknown .*fcfs, priority, sjf, mlfq"),
        ("mlfq:speed=2", "no knob 'speed' .*quantum_seconds"),
        ("fcfs:margin=2", "policy 'fcfs' has no knob 'margin'"),
        ("mlfq:growth=1", "growth of policy 'mlfq'.*1.1"),
        ("mlfq:growth=fast", "growth of policy 'mlfq' is 'fast'"),
        ("priority:margin=1.5", "margin of policy 'priority' is '1.5'"),
    ],
)
def test_an_unknown_policy_or_a_knob_out_of_range_is_refused_by_name(spec: str, message: str) -> None:
    engine, _ = make()
    with pytest.raises(OptionError, match=message):
        engine.set_policy(spec)
    with pytest.raises(OptionError, match=message):
        make(policy=spec)


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_a_slow_tier_that_always_fails_costs_nobody_the_completion(policy: str) -> None:
    engine, mover = make(policy=policy, num_blocks=16, slow_blocks=32, move_cost=1e-7)
    assert mover is not None
    mover.fails = True
    for family in range(3):
        engine.add(prompt_of(16, family=family), SamplingParams(max_tokens=24))
    assert len(finish(engine)) == 3
    assert engine.scheduler.residency.counters.failed_moves <= 3


def test_tenants_whose_names_begin_alike_for_long_do_not_share_prefixes() -> None:
    engine, _ = make(num_blocks=32)
    for tenant in ("x" * 64 + "a", "x" * 64 + "b"):
        engine.add(prompt_of(30, family=1), SamplingParams(max_tokens=1), tenant=tenant)
        finish(engine)
    assert engine.scheduler.residency.counters.prefix_tokens == 0


def test_held_requests_take_no_rows_from_those_that_can_run() -> None:
    engine, _ = make(num_blocks=64)
    held = [engine.add(prompt_of(4, family=n), SamplingParams(max_tokens=20)) for n in range(24)]
    for _ in range(30):
        for chunk in engine.step():
            engine.hold(chunk.request_id)
    other = engine.add(prompt_of(8, family=99), SamplingParams(max_tokens=4))
    chunks = [chunk for _ in range(10) for chunk in engine.step()]
    assert {chunk.request_id for chunk in chunks} == {other}
    for request_id in held:
        engine.abort(request_id)
    finish(engine)


def test_a_block_that_is_to_be_copied_belongs_to_nobody_else_before_it_is() -> None:
    engine, _ = make(num_blocks=32)
    engine.add(prompt_of(6, family=1), SamplingParams(max_tokens=9, n=2))
    while not engine.step():
        pass
    (turn, _) = engine.scheduler.schedule(1.0)
    assert turn.copy is not None
    source, target = turn.copy
    free = engine.pool.allocate(engine.pool.num_free)
    assert source not in free
    assert target not in free
    engine.pool.free(free)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"priority": "high"}, "priority"),
        ({"tenant": 3}, "tenant"),
        ({"prompt": ["Hello"]}, "prompt has 'Hello' among its tokens"),
    ],
)
def test_what_is_not_of_its_kind_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    engine, _ = make()
    prompt = arguments.pop("prompt", [1, 2])
    with pytest.raises(OptionError, match=message):
        engine.add(prompt, SamplingParams(), **arguments)  # type: ignore[arg-type]
