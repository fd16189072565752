"""Deadlines, the bounded queue, the longest wait, and memory that runs out: who is refused, who is ended, and
that nothing is left of them."""

from __future__ import annotations

import pytest
from fake_executable import FakeExecutable, LetterDecoder, plain_loop
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.completion import Completion
from fastserve.engine.engine import Engine
from fastserve.engine.policy import POLICY_NAMES
from fastserve.errors import DeadlineError, MemoryLimitError, OptionError, QueueFullError, StepError
from fastserve.types import Batch, Limits, SamplingParams, StepResult

STEP_SECONDS, ROW_SECONDS = 0.01, 0.001


class TimedExecutable(FakeExecutable):
    """Steps take a hundredth of a second and a thousandth a row; memory runs out where it is told to."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.seconds = 0.0
        self.step_seconds, self.row_seconds = STEP_SECONDS, ROW_SECONDS
        self.num_failures = 0
        self.most_rows = 10**6

    def __call__(self) -> float:
        return self.seconds

    def run(self, batch: Batch) -> StepResult:
        if batch.num_tokens > self.most_rows:
            self.num_failures += 1
            raise MemoryError("no room for activations")
        self.seconds += self.step_seconds + self.row_seconds * batch.num_tokens
        return super().run(batch)


def make(
    *, num_blocks: int = 64, max_sequences: int = 4, policy: str = "fcfs", **options: object
) -> tuple[Engine, TimedExecutable]:
    limits = Limits(
        max_tokens=32,
        max_outputs=max_sequences,
        max_sequences=max_sequences,
        num_blocks=num_blocks,
        max_context=256,
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


def warm_up(engine: Engine) -> None:
    """Let the cost model see what steps cost."""
    for length in range(1, 40, 3):
        engine.add([1] * length, SamplingParams(max_tokens=6))
    finish(engine)


def finish(engine: Engine) -> dict[tuple[int, int], Completion]:
    done = {}
    for _ in range(3000):
        if not engine.has_work:
            assert engine.pool.num_free == engine.pool.num_blocks
            return done
        for chunk in engine.step():
            if chunk.completion is not None:
                assert (chunk.request_id, chunk.index) not in done
                done[chunk.request_id, chunk.index] = chunk.completion
        engine.check_invariants()
    raise AssertionError("a sequence is stuck")


def params_of(num_tokens: int, *, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, n=n)


def test_what_has_not_finished_by_its_deadline_ends_with_an_error_and_frees_everything() -> None:
    engine, _ = make()
    late = engine.add([1] * 10, params_of(200), timeout_ms=500)
    other = engine.add([2] * 10, params_of(100))
    done = finish(engine)
    completion = done[late, 0]
    assert completion.finish_reason == "error"
    assert completion.error == "its timeout_ms of 500 has passed"
    assert 20 < completion.completion_tokens < 60
    assert list(completion.token_ids) == plain_loop([1] * 10, params_of(200), completion.completion_tokens)
    with pytest.raises(DeadlineError, match=r"after \d+ tokens its timeout_ms of 500 has passed .*hint"):
        completion.checked()
    assert done[other, 0].completion_tokens == 100
    assert engine.status().num_expired == 1


def test_all_completions_of_a_request_end_at_its_deadline_before_and_after_they_part() -> None:
    for prompt, timeout_ms in ((200, 100), (10, 300)):
        engine, _ = make()
        late = engine.add([1] * prompt, params_of(50, n=3), timeout_ms=timeout_ms)
        done = finish(engine)
        assert [done[late, index].has_expired for index in range(3)] == [True] * 3


def test_a_completion_that_is_in_time_is_not_touched() -> None:
    engine, _ = make()
    request = engine.add([1] * 10, params_of(20), timeout_ms=10_000)
    assert finish(engine)[request, 0].checked().completion_tokens == 20
    assert engine.status().num_expired == 0


def test_what_cannot_be_complete_in_time_is_refused_early_once_steps_have_been_seen() -> None:
    engine, _ = make()
    unknown = engine.add([1] * 20, params_of(100), timeout_ms=900)  # nobody knows yet what steps cost
    assert finish(engine)[unknown, 0].has_expired
    warm_up(engine)
    with pytest.raises(DeadlineError, match=r"timeout_ms=900: 900 ms are left, itself takes at least \d+"):
        engine.add([1] * 20, params_of(200), timeout_ms=900)
    engine.check_invariants()
    assert not engine.has_work
    assert engine.status().num_refused == 1
    in_time = engine.add([1] * 20, params_of(40), timeout_ms=900)
    assert finish(engine)[in_time, 0].checked()


@pytest.mark.parametrize(("priority_class", "is_refused"), [("standard", True), ("interactive", False)])
def test_what_goes_before_a_request_counts_against_its_deadline(priority_class, is_refused) -> None:
    engine, _ = make(num_blocks=1024)
    warm_up(engine)
    for _ in range(20):
        engine.add([2] * 200, params_of(1))
    request = {"timeout_ms": 1000, "priority_class": priority_class}
    if is_refused:
        with pytest.raises(DeadlineError, match=r"what is before it \d{4}"):
            engine.add([1] * 10, params_of(5), **request)
    else:
        late = engine.add([1] * 10, params_of(5), **request)
        assert finish(engine)[late, 0].checked()
    finish(engine)


def test_who_had_no_turn_while_it_could_still_be_in_time_ends_before_its_deadline() -> None:
    engine, executable = make(max_sequences=1)
    warm_up(engine)
    start = executable.seconds
    engine.add([2] * 10, params_of(200))
    engine.step()
    late = engine.add([1] * 10, params_of(60), timeout_ms=2000)
    done = {}
    while (late, 0) not in done:
        done |= {(c.request_id, c.index): c.completion for c in engine.step() if c.completion}
    assert done[late, 0].error == "it had no turn while it could be complete within its timeout_ms of 2000"
    assert executable.seconds - start < 1.8
    finish(engine)


def test_a_deadline_in_the_past_is_refused() -> None:
    engine, executable = make()
    executable.seconds = 100.0
    with pytest.raises(DeadlineError, match=r"timeout_ms=500 of the request was over 1\.5 seconds ago"):
        engine.add([1], SamplingParams(max_tokens=1), timeout_ms=500, arrival_seconds=98.0)
    assert not engine.has_work
    engine.check_invariants()


def test_a_full_queue_refuses_with_a_time_to_try_again_that_is_about_right() -> None:
    engine, executable = make(max_waiting=5, max_sequences=2)
    for _ in range(5):
        engine.add([1] * 10, params_of(40))
    with pytest.raises(
        QueueFullError, match=r"5 requests wait .*max_waiting is 5 .*try again in about"
    ) as full:
        engine.add([1] * 10, params_of(40))
    assert 0 < full.value.retry_after_seconds < 1  # by what prompts cost: nobody has started yet
    num_added = 5
    for _ in range(300):
        try:
            engine.add([1] * 10, params_of(40))
            num_added += 1
        except QueueFullError as error:
            retry = error.retry_after_seconds
        engine.step()
        assert engine.status().num_unstarted <= 5
    assert retry == pytest.approx(executable.seconds / num_added, rel=0.4)
    finish(engine)


def test_when_to_try_again_is_not_reckoned_from_times_when_nobody_waited() -> None:
    """A stream that has run alone for long, then a burst, which starts as fast as it would at any time."""
    engine, executable = make(max_waiting=4, max_sequences=4, num_blocks=128)
    for _ in range(8):
        engine.add([1] * 10, params_of(2))
        finish(engine)
    engine.add([1] * 10, params_of(200))
    for _ in range(150):
        engine.step()
    start = executable.seconds
    for _ in range(4):
        engine.add([1] * 10, params_of(2))
    with pytest.raises(QueueFullError) as full:
        engine.add([1] * 10, params_of(2))
    while engine.status().num_unstarted == 4:
        engine.step()
    assert full.value.retry_after_seconds < 5 * (executable.seconds - start)
    finish(engine)


def test_who_waits_too_long_for_a_first_turn_ends_and_who_has_had_one_does_not() -> None:
    engine, _ = make(queue_timeout_ms=300, max_sequences=1)
    running = engine.add([1] * 10, params_of(100))
    waiting = engine.add([2] * 10, params_of(1))
    done = finish(engine)
    assert done[waiting, 0].error == "it had no turn within the queue_timeout_ms of 300"
    with pytest.raises(DeadlineError, match="after 0 tokens it had no turn"):
        done[waiting, 0].checked()
    assert done[running, 0].checked()


def test_a_held_request_ends_at_its_deadline_too() -> None:
    engine, executable = make()
    request = engine.add([1] * 4, params_of(10), timeout_ms=1000)
    engine.hold(request)
    assert engine.step() == []
    executable.seconds += 2.0
    (chunk,) = engine.step()
    assert chunk.completion is not None
    assert chunk.completion.has_expired
    finish(engine)


def test_times_of_requests_that_have_ended_do_not_pile_up() -> None:
    engine, _ = make(queue_timeout_ms=1e6)
    for _ in range(500):
        engine.add([1], params_of(1), timeout_ms=1e6)
        finish(engine)
    assert len(engine._admission._times) < 100
    assert not engine._admission._watched


def test_memory_that_runs_out_ends_one_request_and_the_others_get_their_tokens() -> None:
    engine, executable = make(num_blocks=256, max_sequences=8)
    executable.most_rows = 20
    small = [engine.add([index] * 3, params_of(30)) for index in range(3)]
    for _ in range(3):
        engine.step()
    large = engine.add([9] * 100, params_of(3))
    done = finish(engine)
    assert executable.num_failures == 1
    assert done[large, 0].error == "its step ran out of memory: no room for activations"
    with pytest.raises(StepError, match="ran out of memory"):
        done[large, 0].checked()
    for index, request in enumerate(small):
        assert list(done[request, 0].token_ids) == plain_loop([index] * 3, params_of(30), 30)


def test_completions_that_share_a_block_survive_a_step_that_runs_out_of_memory() -> None:
    engine, executable = make(num_blocks=64, max_sequences=6)
    shared = engine.add([5] * 6, SamplingParams(max_tokens=9, n=3, temperature=1.0, seed=1))
    engine.step()  # the next step copies the block that the three share
    engine.add([6] * 25, params_of(2))
    executable.most_rows = 10
    done = finish(engine)
    assert executable.num_failures == 1
    for index in range(3):
        params = SamplingParams(max_tokens=9, temperature=1.0, seed=1 + index)
        assert list(done[shared, index].token_ids) == plain_loop([5] * 6, params, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout_ms": -1}, r"timeout_ms=-1 is out of range .*above 0"),
        ({"timeout_ms": 0}, r"timeout_ms=0 is out of range"),
        ({"timeout_ms": 1e12}, r"timeout_ms=1000000000000\.0 is out of range .*at most 6\.048e\+08"),
        ({"timeout_ms": float("nan")}, "timeout_ms=nan is out of range"),
        ({"timeout_ms": "soon"}, "timeout_ms='soon' is not a number"),
        ({"priority_class": "urgent"}, "priority_class='urgent' is unknown .*interactive, standard, batch"),
        ({"tenant": "c"}, "tenant 'c' is unknown: it is none of the 2 of tenant_weights .*hint"),
        ({"session": 7}, "session=7 is not a name"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    engine, _ = make(tenant_weights={"a": 1.0, "b": 2.0}, unknown_tenants="refuse")
    with pytest.raises(OptionError, match=message):
        engine.add([1, 2], SamplingParams(max_tokens=1), **({"tenant": "a"} | arguments))
    assert not engine.has_work
    assert engine.status().num_refused == 0  # that was no lack of room


def test_without_guards_requests_that_do_not_fit_together_do_not_displace_each_other_for_ever() -> None:
    engine, _ = make(policy="mlfq-published", num_blocks=32)
    engine.add([1] * 76, SamplingParams(max_tokens=31, temperature=1.0, seed=1, n=3))
    for _ in range(3):
        engine.step()
    engine.add([2] * 48, SamplingParams(max_tokens=23), tenant="a")
    assert all(completion.error is None for completion in finish(engine).values())


def test_without_guards_nobody_is_displaced_for_ever_with_one_token_of_its_prefix_left_to_compute() -> None:
    engine, _ = make(policy="mlfq-published", num_blocks=32)
    engine.add([1] * 77, SamplingParams(max_tokens=40, temperature=1.0, seed=1, n=3))
    for _ in range(26):
        engine.step()
    engine.add([2] * 36, SamplingParams(max_tokens=29))
    assert all(completion.error is None for completion in finish(engine).values())


streams = st.lists(
    st.tuples(
        st.integers(0, 150),  # prompt tokens: none, or more than the memory holds, is impossible
        st.integers(1, 40),  # completion tokens
        st.integers(1, 3),  # completions
        st.integers(0, 30),  # step of its arrival
        st.sampled_from([None, 1.0, 200.0, 1000.0, 5000.0]),  # timeout_ms
        st.sampled_from(["interactive", "standard", "batch", None]),
        st.sampled_from(["", "a", "b"]),  # tenant, and session
    ),
    min_size=1,
    max_size=16,
)


@settings(deadline=None, max_examples=120)
@given(
    stream=streams,
    policy=st.sampled_from(POLICY_NAMES),
    jumps=st.dictionaries(st.integers(0, 60), st.sampled_from([-5.0, -0.1, 0.3, 10.0]), max_size=4),
    aborts=st.dictionaries(st.integers(0, 60), st.integers(0, 15), max_size=4),
    shortages=st.sets(st.integers(0, 60), max_size=4),
    max_waiting=st.sampled_from([None, 3]),
    queue_timeout_ms=st.sampled_from([None, 300.0]),
)
def test_every_request_is_refused_or_ends_once_and_leaves_nothing(
    stream, policy, jumps, aborts, shortages, max_waiting, queue_timeout_ms
) -> None:
    engine, executable = make(
        policy=policy, num_blocks=32, max_waiting=max_waiting, queue_timeout_ms=queue_timeout_ms
    )
    ids: dict[int, int] = {}
    done: dict[tuple[int, int], Completion] = {}
    for step in range(3000):
        for index, (prompt, length, n, arrival, timeout_ms, priority_class, name) in enumerate(stream):
            if arrival != step:
                continue
            try:
                ids[index] = engine.add(
                    [index] * prompt,
                    SamplingParams(max_tokens=length, temperature=1.0, seed=index, n=n),
                    tenant=name,
                    session=name,
                    priority_class=priority_class,
                    timeout_ms=timeout_ms,
                )
            except (DeadlineError, QueueFullError, MemoryLimitError):
                pass
            except OptionError:
                if prompt:  # none is what it refuses
                    raise
            engine.check_invariants()
        if aborts.get(step) in ids:
            engine.abort(ids[aborts[step]])
        executable.seconds += jumps.get(step, 0.0)
        executable.most_rows = 2 if step in shortages else 10**6
        for chunk in engine.step():
            if chunk.completion is not None:
                assert (chunk.request_id, chunk.index) not in done
                done[chunk.request_id, chunk.index] = chunk.completion
        engine.check_invariants()
        if step > 60 and not engine.has_work:
            break
    assert not engine.has_work
    assert engine.pool.num_free == 32
    assert not engine._admission._watched
    ended = [request_id for (request_id, _), c in done.items() if "ran out of memory" in (c.error or "")]
    assert len(set(ended)) <= executable.num_failures, "one shortage ended several requests"
    for index, request_id in ids.items():
        prompt, length, n, *_ = stream[index]
        for i in range(n):
            completion = done.get((request_id, i))
            if completion is None:
                assert index in aborts.values()
                continue
            params = SamplingParams(max_tokens=length, temperature=1.0, seed=index + i)
            expected = plain_loop([index] * prompt, params, length)
            num_tokens = completion.completion_tokens
            assert list(completion.token_ids) == expected[:num_tokens]
            assert num_tokens == length or completion.error is not None


@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(deadline=None, max_examples=15)
@given(jumps=st.dictionaries(st.integers(0, 60), st.sampled_from([-1024.0, -5.0, -0.125]), min_size=1))
def test_a_clock_that_jumps_back_changes_nothing(policy, jumps) -> None:
    def tokens_by_step(jumps: dict[int, float]) -> list[list[int]]:
        engine, executable = make(policy=policy, num_blocks=24, queue_timeout_ms=2000)
        executable.step_seconds, executable.row_seconds = 1 / 128, 1 / 1024  # sums have no rounding
        steps = []
        for step in range(2000):
            if step < 12:
                engine.add([step] * (5 + 20 * (step % 2)), params_of(10 + step), timeout_ms=5000)
            if step >= 12 and not engine.has_work:
                return steps
            executable.seconds += jumps.get(step, 0.0)
            steps.append([chunk.request_id for chunk in engine.step()])
        raise AssertionError("a sequence is stuck")

    assert tokens_by_step(jumps) == tokens_by_step({})


@pytest.mark.parametrize("policy", ["fcfs", "priority", "mlfq"])  # for the others no two are alike
@settings(deadline=None, max_examples=15)
@given(jumps=st.dictionaries(st.integers(0, 40), st.sampled_from([0.5, 30.0, 4000.0]), max_size=4))
def test_a_clock_that_jumps_forward_does_not_let_later_ones_start_before_earlier_ones_like_them(
    policy, jumps
) -> None:
    engine, executable = make(policy=policy, num_blocks=32)
    first: dict[int, int] = {}
    for step in range(3000):
        if step < 12:
            engine.add([step] * 9, params_of(12))
        executable.seconds += jumps.get(step, 0.0)
        for chunk in engine.step():
            first.setdefault(chunk.request_id, step)
        engine.check_invariants()
        if step >= 12 and not engine.has_work:
            break
    assert len(first) == 12
    assert [first[request] for request in sorted(first)] == sorted(first.values())


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_completions_that_end_with_their_first_token_are_empty_and_the_next_ones_come(policy) -> None:
    engine, _ = make(policy=policy)
    completions: list[Completion | None] = []
    for index in range(200):
        prompt = [index % 7, index % 5]
        (token,) = plain_loop(prompt, params_of(1), 1)
        params = SamplingParams(max_tokens=50, stop_token_ids=[token])
        engine.add(prompt, params)
        if index % 3 == 0:
            completions += [chunk.completion for chunk in engine.step()]
    completions += finish(engine).values()
    assert len(completions) == 200
    assert {(c.finish_reason, c.text, c.completion_tokens) for c in completions if c} == {("stop", "", 1)}


@settings(deadline=None, max_examples=60)
@given(
    policy=st.sampled_from([name for name in POLICY_NAMES if name != "mlfq-published"]),
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=4, max_size=24),
    num_blocks=st.integers(31, 60),
)
def test_under_any_pressure_a_request_is_evicted_a_few_times_at_most(policy, sizes, num_blocks) -> None:
    engine, _ = make(policy=policy, num_blocks=num_blocks, max_sequences=8)
    most = 0
    for step in range(4000):
        if step < len(sizes):
            prompt, length = sizes[step]
            engine.add([step] * prompt, params_of(length), priority=step % 3)
        engine.step()
        most = max([most, *(sequence.num_evictions for sequence in engine.scheduler.sequences)])
        if step >= len(sizes) and not engine.has_work:
            break
    assert not engine.has_work
    assert most <= 8
