"""Tenants, priority classes and sessions before every policy, on the scheduler alone."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import ScheduleOptions
from fastserve.engine.policy import POLICY_NAMES
from fastserve.engine.schedule import Scheduler, make_scheduler
from fastserve.engine.sequence import Sequence
from fastserve.engine.tenant import _MOST_IDLE, COMPLETION_TOKEN_SERVICE, Tenants
from fastserve.engine.turn import Turn
from fastserve.errors import OptionError
from fastserve.types import Limits

BLOCK_SIZE = 4


class Driver:
    """Steps of a scheduler whose completions are as long as their `max_tokens`."""

    def __init__(self, *, num_blocks: int = 64, max_sequences: int = 6, **options: object) -> None:
        limits = Limits(
            max_tokens=24,
            max_outputs=max_sequences,
            max_sequences=max_sequences,
            num_blocks=num_blocks,
            max_context=256,
        )
        self.scheduler: Scheduler = make_scheduler(
            limits,
            block_size=BLOCK_SIZE,
            options=ScheduleOptions(**options),  # type: ignore[arg-type]
        )
        self.now = 0.0
        self.served: Counter[str] = Counter()  # weighted service by tenant, counted apart from the accounts
        self.ended: list[Sequence] = []
        self._ids = count()
        self._read: dict[int, int] = {}  # tokens of prompts, by sequence_id: never twice

    def add(self, prompt: int, completion: int, *, tenant: str = "", **fields: object) -> Sequence:
        sequence_id = next(self._ids)
        sequence = Sequence(
            sequence_id=sequence_id,
            token_ids=[1000 + sequence_id] * prompt,
            num_prompt_tokens=prompt,
            max_tokens=completion,
            arrival_seconds=self.now,
            tenant=tenant,
            scope=tenant.encode(),
            **fields,  # type: ignore[arg-type]
        )
        self.scheduler.add(sequence, self.now)
        return sequence

    def step(self) -> list[Turn]:
        turns = self.scheduler.schedule(self.now)
        self.now += 0.01
        self.scheduler.commit(turns, seconds=0.01, now=self.now)
        for turn in turns:
            sequence = turn.sequence
            read = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            before = self._read.get(sequence.sequence_id, 0)
            self._read[sequence.sequence_id] = max(before, read)
            self.served[sequence.tenant] += max(0, read - before)
            for output in turn.outputs:
                self._read.setdefault(output.sequence_id, output.num_prompt_tokens)  # of a fork: not its own
                output.token_ids.append(7)
                self.served[sequence.tenant] += COMPLETION_TOKEN_SERVICE
                if output.num_completion_tokens == output.max_tokens:
                    self.scheduler.finish(output)
                    self.ended.append(output)
        self.scheduler.check_invariants()
        return turns


lengths = st.tuples(st.integers(1, 60), st.integers(1, 60))  # of prompts and completions


@settings(deadline=None, max_examples=60)
@given(
    policy=st.sampled_from(POLICY_NAMES),
    kinds=st.lists(lengths, min_size=2, max_size=4),
    weights=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=4, max_size=4),
    num_blocks=st.integers(32, 80),
    max_sequences=st.integers(2, 8),
    chunk=st.sampled_from([None, 8]),
)
def test_service_of_backlogged_tenants_differs_by_no_more_than_the_bound(
    policy, kinds, weights, num_blocks, max_sequences, chunk
) -> None:
    """|W_f - W_g| <= 2 max(w_p L_in, w_q M) over any time in which both are backlogged, by weights."""
    names = [str(index) for index in range(len(kinds))]
    driver = Driver(
        policy=policy,
        num_blocks=num_blocks,
        max_sequences=max_sequences,
        prefill_chunk_tokens=chunk,
        tenant_weights=dict(zip(names, weights, strict=False)),
    )
    differences: dict[tuple[str, str], list[float]] = {}
    for _ in range(250):
        waiting = Counter(s.tenant for s in driver.scheduler.sequences if not s.is_started)
        for name, (prompt, completion) in zip(names, kinds, strict=True):
            for _ in range(max_sequences + 1 - waiting[name]):
                driver.add(prompt, completion, tenant=name)
        driver.step()
        for f, w_f in zip(names, weights, strict=False):
            for g, w_g in zip(names, weights, strict=False):
                difference = driver.served[f] / w_f - driver.served[g] / w_g
                differences.setdefault((f, g), []).append(difference)
    longest_prompt = max(prompt for prompt, _ in kinds)
    bound = 2 * max(longest_prompt, COMPLETION_TOKEN_SERVICE * num_blocks * BLOCK_SIZE)
    for (f, g), values in differences.items():
        least = min(weights[int(f)], weights[int(g)])
        assert max(values) - min(values) <= bound / least


def test_without_fair_share_a_flood_takes_what_the_bound_would_leave_to_others() -> None:
    served = {}
    for fair_share in ("tenant", "off"):
        driver = Driver(fair_share=fair_share)
        for _ in range(200):
            driver.add(20, 40, tenant="flood")
        for _ in range(40):
            driver.add(20, 40, tenant="other")
        for _ in range(200):
            driver.step()
        served[fair_share] = driver.served["other"]
    assert served["off"] == 0
    assert served["tenant"] > 1000


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_tenants_share_the_rows_of_a_single_step(policy: str) -> None:
    """Nobody's streams stand still for a step in which another's have all rows."""
    driver = Driver(policy=policy, max_sequences=8, num_blocks=256)
    for tenant in ("a", "b"):
        for _ in range(8):
            driver.add(2, 200, tenant=tenant)
    for _ in range(20):  # until all are read and nobody is ahead
        driver.step()
    for _ in range(40):
        assert Counter(turn.sequence.tenant for turn in driver.step()) == {"a": 4, "b": 4}


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_tenant_with_fewer_streams_than_its_share_of_rows_gets_turns_for_all(policy: str) -> None:
    for num_streams, share in ((2, 2.0), (6, 4.0)):
        driver = Driver(policy=policy, max_sequences=8, num_blocks=512)
        for tenant, num in (("few", num_streams), ("many", 12)):
            for _ in range(num):
                driver.add(2, 200, tenant=tenant)
        for _ in range(20):
            driver.step()
        turns = [Counter(turn.sequence.tenant for turn in driver.step()) for _ in range(60)]
        assert sum(turn["few"] for turn in turns) / 60 == pytest.approx(share, abs=0.2)


@pytest.mark.parametrize("length", range(20, 28))
def test_whoever_the_order_puts_last_yields_when_memory_is_short(length: int) -> None:
    """By arrival that would be the other, which is better."""
    driver = Driver(num_blocks=16)
    driver.add(length, 60, class_index=1)
    for _ in range(10):
        driver.step()
    late = driver.add(16, 60, class_index=0)
    while not late.is_started:
        driver.step()
    while not any(s.num_evictions for s in driver.scheduler.sequences):
        driver.step()
    assert late.num_evictions == 0


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_twice_the_weight_is_twice_the_service(policy: str) -> None:
    driver = Driver(policy=policy, tenant_weights={"double": 2.0}, num_blocks=32)
    for _ in range(600):
        driver.add(12, 12, tenant="double")
        driver.add(12, 12, tenant="single")
    for _ in range(900):
        driver.step()
    assert driver.served["double"] / driver.served["single"] == pytest.approx(2.0, rel=0.1)


@settings(deadline=None, max_examples=40)
@given(policy=st.sampled_from(POLICY_NAMES), num_steps=st.integers(1, 120), had_some=st.booleans())
def test_who_was_idle_has_banked_nothing(policy: str, num_steps: int, had_some: bool) -> None:
    """However long the other has had all, both get the same from the return on."""
    driver = Driver(policy=policy, num_blocks=32)
    if had_some:
        driver.add(4, 1, tenant="idle")
        while driver.scheduler.has_work:
            driver.step()
    for _ in range(300):
        driver.add(10, 10, tenant="busy")
    for _ in range(num_steps):
        driver.step()
    before = driver.served.copy()
    for _ in range(300):
        driver.add(10, 10, tenant="idle")
    bound = 2 * COMPLETION_TOKEN_SERVICE * 32 * BLOCK_SIZE
    for _ in range(150):
        driver.step()
        gains = driver.served - before
        assert gains["idle"] - gains["busy"] <= bound / 2


def test_who_has_streams_alone_banks_nothing_while_all_of_them_run() -> None:
    """A tenant whose every wish is served is not behind, however little it wishes."""
    driver = Driver(max_sequences=4, num_blocks=256)
    driver.add(4, 250, tenant="stream")
    for _ in range(100):
        driver.add(20, 20, tenant="flood")
    for _ in range(150):
        driver.step()
    before = driver.served.copy()
    for _ in range(100):
        driver.add(20, 20, tenant="stream")
    for _ in range(60):
        driver.step()
    gains = driver.served - before
    assert gains["flood"] >= 0.8 * gains["stream"]


requests = st.lists(
    st.tuples(
        st.integers(1, 50),  # prompt tokens
        st.integers(1, 30),  # completion tokens
        st.integers(0, 30),  # step of its arrival
        st.integers(0, 3),  # tenant
        st.integers(0, 2),  # class
        st.booleans(),  # of a session
    ),
    min_size=1,
    max_size=20,
)


def run(requests, **options: object) -> list[list[tuple[int, int]]]:
    """The turns of all steps."""
    driver = Driver(num_blocks=24, **options)
    all_turns = []
    for step in range(3000):
        for prompt, completion, arrival, tenant, class_index, has_session in requests:
            if arrival == step:
                driver.add(
                    prompt,
                    completion,
                    tenant=str(tenant),
                    class_index=class_index,
                    session="s" if has_session else "",
                )
        num_live = len(driver.scheduler.sequences)
        turns = driver.step()
        assert turns or not num_live  # work conservation: nobody here is held or on the way
        all_turns.append([(turn.sequence.sequence_id, turn.num_tokens) for turn in turns])
        if step > 30 and not driver.scheduler.has_work:
            break
    assert len(driver.ended) == len(requests)
    assert driver.scheduler.residency.pool.num_free == 24
    return all_turns


@settings(deadline=None, max_examples=60)
@given(requests=requests, policy=st.sampled_from(POLICY_NAMES))
def test_whatever_tenants_classes_and_sessions_there_are_a_step_has_work_and_all_finish(
    requests, policy
) -> None:
    run(requests, policy=policy)
    run(requests, policy=policy, tenant_weights={"0": 0.01, "1": 100.0})


@settings(deadline=None, max_examples=60)
@given(requests=requests, policy=st.sampled_from(POLICY_NAMES))
def test_with_one_tenant_and_one_class_the_turns_are_those_of_the_policy_alone(requests, policy) -> None:
    alone = [(*request[:3], 1, 0, False) for request in requests]
    assert run(alone, policy=policy) == run(alone, policy=policy, fair_share="off")


def test_a_prompt_is_charged_once_and_what_was_cached_not_at_all() -> None:
    tenants = Tenants(chunk_tokens=24, most_turns=6)
    sequence = Sequence(
        sequence_id=0, token_ids=[1] * 20, num_prompt_tokens=20, max_tokens=9, arrival_seconds=0
    )
    tenants.enter(sequence)
    sequence.num_computed_tokens = 8  # found in the cache: it is in memory, and has had no turn
    tenants.charge(sequence)
    tenants.charge_all([sequence])
    assert tenants.counter("") == 0
    sequence.is_started, sequence.num_charged_tokens = True, 8
    sequence.num_computed_tokens = 20
    tenants.charge(sequence)
    assert tenants.counter("") == 12
    sequence.num_computed_tokens = 0  # dropped, and half computed again
    tenants.charge(sequence)
    sequence.num_computed_tokens = 10
    tenants.charge(sequence)
    assert tenants.counter("") == 12
    sequence.token_ids += [1, 2, 3]
    tenants.charge(sequence)
    assert tenants.counter("") == 12 + 3 * COMPLETION_TOKEN_SERVICE


def test_all_service_is_charged_at_the_end_and_completions_of_one_prompt_pay_for_it_once() -> None:
    driver = Driver()
    rival = driver.add(20, 60, tenant="rival")
    first = driver.add(20, 5, tenant="a")
    first.forks = [
        Sequence(
            sequence_id=100 + index,
            token_ids=list(first.token_ids),
            num_prompt_tokens=20,
            max_tokens=5,
            arrival_seconds=0.0,
            tenant="a",
            scope=b"a",
        )
        for index in range(2)
    ]
    tenants = driver.scheduler._precedence._tenants
    assert tenants is not None
    tenants.settle = lambda wanting: None  # type: ignore[method-assign]
    while len(driver.ended) < 3:
        driver.step()
    assert driver.served["a"] == 20 + 3 * 5 * COMPLETION_TOKEN_SERVICE
    assert tenants.counter("a") == driver.served["a"]
    driver.scheduler.finish(rival)
    assert tenants.counter("rival") == driver.served["rival"]


def test_of_very_many_tenants_that_came_once_only_some_are_remembered() -> None:
    tenants = Tenants(chunk_tokens=24, most_turns=6)
    tenants.enter(
        Sequence(sequence_id=0, token_ids=[1], num_prompt_tokens=1, max_tokens=1, arrival_seconds=0)
    )
    for index in range(2 * _MOST_IDLE):
        one = Sequence(
            sequence_id=index,
            token_ids=[1, 1],
            num_prompt_tokens=1,
            max_tokens=1,
            arrival_seconds=0,
            tenant=str(index),
            is_started=True,
        )
        tenants.enter(one)
        tenants.leave(one)
    assert len(tenants._idle) <= _MOST_IDLE
    assert tenants.counter(str(index)) > 0  # who came last and had more than the floor is not forgotten


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_better_class_goes_first_whatever_the_policy(policy: str) -> None:
    driver = Driver(policy=policy, max_sequences=2, num_blocks=64)
    for _ in range(4):
        driver.add(4, 8, class_index=2)
    for _ in range(3):
        driver.step()
    late = [driver.add(30, 20, class_index=0, priority=5) for _ in range(2)]
    assert list(driver.scheduler.order()[:2]) == late
    assert driver.step()[0].sequence is late[0]
    while driver.scheduler.has_work:
        driver.step()
    assert set(driver.ended[:2]) == set(late)


def test_a_better_class_takes_the_memory_of_a_worse_one_where_that_pays() -> None:
    """Under `fcfs`, which takes nobody's within a class."""
    for class_index, ends_first in ((0, True), (1, False)):
        driver = Driver(num_blocks=16)
        driver.add(40, 24, class_index=1)
        for _ in range(20):
            driver.step()
        late = driver.add(40, 4, class_index=class_index)
        while driver.scheduler.has_work:
            driver.step()
        assert (driver.ended[0] is late) == ends_first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tenant_weights": {"a": -1}}, r"tenant_weights\['a'\]=-1 is out of range .*above 0 and at most 1e"),
        ({"tenant_weights": {"a": 0}}, r"tenant_weights\['a'\]=0 is out of range"),
        ({"tenant_weights": {"a": float("nan")}}, r"tenant_weights\['a'\]=nan is out of range"),
        ({"tenant_weights": {"a": "2"}}, r"tenant_weights\['a'\]='2' is not a number"),
        ({"tenant_weights": {3: 1}}, "a tenant of tenant_weights=3 is not a name"),
        ({"tenant_weights": [1]}, "is not a mapping from tenants to weights"),
        ({"tenant_weights": {"a": 1}, "fair_share": "off"}, "no use with fair_share='off'"),
        ({"unknown_tenants": "refuse"}, "would refuse everybody"),
        ({"fair_share": "all"}, "fair_share='all' is unknown .*tenant, off"),
        ({"priority_classes": ()}, r"priority_classes=\(\) is not a sequence of names"),
        ({"priority_classes": "standard"}, "priority_classes='standard' is not a sequence of names"),
        ({"priority_classes": ("a", "a"), "default_class": "a"}, "has a name twice"),
        ({"default_class": "urgent"}, "default_class='urgent' is unknown .*interactive, standard, batch"),
        ({"max_waiting": 0}, "max_waiting=0 is out of range .*at least 1"),
        ({"queue_timeout_ms": 0}, "queue_timeout_ms=0 is out of range .*above 0"),
        ({"queue_timeout_ms": -5}, "queue_timeout_ms=-5 is out of range"),
        ({"session_idle_seconds": 0}, "session_idle_seconds=0 is out of range"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ScheduleOptions(**options)  # type: ignore[arg-type]
