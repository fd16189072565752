"""Sessions: the tenth call of a program is no newcomer."""

from __future__ import annotations

import pytest
from test_tenant import Driver

from fastserve.engine.sequence import Sequence
from fastserve.engine.session import Sessions


def sequence_of(session: str, *, tenant: str = "") -> Sequence:
    return Sequence(
        sequence_id=0,
        token_ids=[1],
        num_prompt_tokens=1,
        max_tokens=1,
        arrival_seconds=0.0,
        session=session,
        tenant=tenant,
    )


def test_a_sequence_begins_with_what_its_session_has_attained() -> None:
    sessions = Sessions(idle_seconds=10.0)
    first = sequence_of("agent")
    sessions.enter(first, 0.0)
    assert first.inherited_seconds == 0
    sessions.serve(first, 0.5, 1.0)
    sessions.serve(first, 0.25, 2.0)
    sessions.leave(first)
    second, others, elsewhere = sequence_of("agent"), sequence_of("b"), sequence_of("agent", tenant="x")
    for sequence in (second, others, elsewhere):
        sessions.enter(sequence, 3.0)
    assert (second.inherited_seconds, second.attained_seconds) == (0.75, 0.0)
    assert others.inherited_seconds == elsewhere.inherited_seconds == 0


@pytest.mark.parametrize(("session", "first"), [("agent", "newcomer"), ("", "agent")])
def test_under_mlfq_the_late_call_of_an_agent_yields_to_a_newcomer(session: str, first: str) -> None:
    driver = Driver(policy="mlfq", max_sequences=1, fair_share="off")
    for _ in range(4):
        driver.add(8, 20, session=session)
        while driver.scheduler.has_work:
            driver.step()
    agent = driver.add(8, 20, session=session)
    newcomer = driver.add(8, 20)
    while driver.scheduler.has_work:
        driver.step()
    order = {"agent": agent, "newcomer": newcomer}
    assert driver.ended[4] is order[first]


def test_an_idle_session_is_forgotten_and_one_with_requests_is_not() -> None:
    sessions = Sessions(idle_seconds=10.0)
    used, left = sequence_of("used"), sequence_of("left")
    for sequence in (used, left):
        sessions.enter(sequence, 0.0)
        sessions.serve(sequence, 1.0, 0.0)
    sessions.leave(left)
    again = sequence_of("left")
    sessions.enter(again, 10.0)
    assert again.inherited_seconds == 1.0
    sessions.leave(again)
    for now in (-50.0, 30.0):  # the clock jumps back and forth
        sessions.enter(sequence_of("used"), now)
    later = sequence_of("left")
    sessions.enter(later, 31.0)
    assert later.inherited_seconds == 0.0
    sessions.serve(used, 1.0, 32.0)
    last = sequence_of("used")
    sessions.enter(last, 33.0)
    assert last.inherited_seconds == 2.0


def test_one_that_is_busy_for_long_keeps_no_idle_ones_from_being_forgotten() -> None:
    sessions = Sessions(idle_seconds=10.0)
    busy = sequence_of("busy")
    sessions.enter(busy, 0.0)
    for index in range(50):
        idle = sequence_of(str(index))
        sessions.enter(idle, 0.1 * index)
        sessions.serve(idle, 1.0, 0.1 * index)
        sessions.leave(idle)
    for now in range(5, 100):
        sessions.serve(busy, 1.0, float(now))
    again = sequence_of("7")
    sessions.enter(again, 100.0)
    assert again.inherited_seconds == 0
    assert len(sessions) == 2


def test_sessions_are_bounded_and_the_longest_unused_goes_first() -> None:
    sessions = Sessions(idle_seconds=1e9, most=8)
    running = sequence_of("running")
    sessions.enter(running, 0.0)
    for index in range(100):
        sequence = sequence_of(str(index))
        sessions.enter(sequence, float(index))
        sessions.serve(sequence, 1.0, float(index))
        sessions.leave(sequence)
    assert len(sessions) <= 9
    sessions.serve(running, 1.0, 200.0)  # it is still there
    newest, oldest = sequence_of("99"), sequence_of("3")
    sessions.enter(newest, 200.0)
    sessions.enter(oldest, 200.0)
    assert (newest.inherited_seconds, oldest.inherited_seconds) == (1.0, 0.0)


def test_a_completion_that_parts_from_its_prompt_belongs_to_the_session_too() -> None:
    driver = Driver(policy="mlfq")
    first = driver.add(8, 4, session="s")
    first.forks = [
        Sequence(
            sequence_id=100,
            token_ids=list(first.token_ids),
            num_prompt_tokens=8,
            max_tokens=9,
            arrival_seconds=0.0,
            session="s",
        )
    ]
    while driver.scheduler.has_work:
        driver.step()
    assert len(driver.ended) == 2
    assert driver.add(1, 1, session="s").inherited_seconds == pytest.approx(0.01 * (1 + 3 + 8))
