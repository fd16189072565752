"""What a newcomer would wait for in order of arrival: by the work that has not been begun."""

from __future__ import annotations

import pytest

from fastserve.engine.policy.backlog import Backlog


def test_it_is_the_work_of_those_that_have_not_begun_and_who_gives_up_is_not_waited_for() -> None:
    backlog = Backlog()
    for work in (5.0, 1.0, 4.0):
        backlog.add(work)
    assert backlog.wait_seconds == pytest.approx(10.0)
    backlog.remove(4.0)
    backlog.begin(1.0)
    assert backlog.wait_seconds == pytest.approx(5.0, rel=0.15)
    backlog.remove(5.0)
    assert backlog.wait_seconds == 0.0


def test_a_machine_that_begins_half_of_what_costs_say_makes_everybody_wait_twice_as_long() -> None:
    backlog = Backlog()
    backlog.add(100.0)
    for _ in range(2000):
        backlog.add(0.5)
        backlog.pass_time(1.0)
        backlog.begin(0.5)
    assert backlog.wait_seconds == pytest.approx(200.0, rel=0.02)


def test_time_in_which_nobody_waits_tells_nothing_of_how_fast_work_is_begun() -> None:
    backlog = Backlog()
    for _ in range(1000):
        backlog.pass_time(1.0)
    backlog.add(7.0)
    assert backlog.wait_seconds == pytest.approx(7.0)


def test_the_longest_wait_is_remembered_for_a_while_and_a_clock_that_jumps_does_not_raise_it() -> None:
    backlog = Backlog()
    backlog.add(50.0)
    assert backlog.peak_seconds(100.0) == pytest.approx(50.0)
    assert backlog.peak_seconds(1e7) == pytest.approx(50.0), "they wait still"
    backlog.remove(50.0)
    backlog.add(1.0)
    assert 10.0 < backlog.peak_seconds(1e7 + 300.0) < 50.0
    assert backlog.peak_seconds(-1e7) < 50.0
    assert backlog.peak_seconds(1e9) == pytest.approx(1.0)
