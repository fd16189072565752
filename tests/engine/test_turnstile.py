"""Engines take turns at the cores."""

from __future__ import annotations

import time
from itertools import pairwise
from threading import Barrier, Thread

import pytest
from fake_executable import make_engine

from fastserve.engine.turnstile import Turnstile
from fastserve.types import SamplingParams

LATE_SECONDS = 30.0  # of a busy machine


def wait_for(turnstile: Turnstile, num_waiting: int) -> None:
    deadline = time.monotonic() + LATE_SECONDS
    while turnstile.num_waiting < num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_who_comes_first_goes_first() -> None:
    turnstile, order = Turnstile(), []

    def pass_through(name: int) -> None:
        with turnstile:
            order.append(name)

    threads = [Thread(target=pass_through, args=(name,)) for name in range(8)]
    with turnstile:
        for num_before, thread in enumerate(threads):
            thread.start()
            wait_for(turnstile, num_before + 1)
        assert order == []
    for thread in threads:
        thread.join(LATE_SECONDS)
    assert order == list(range(8))
    assert turnstile.num_waiting == 0


def test_one_at_a_time_is_within_and_those_who_always_come_again_alternate() -> None:
    turnstile, order, within = Turnstile(), [], []
    start = Barrier(2)

    def step(name: str) -> None:
        start.wait(LATE_SECONDS)
        for _ in range(200):
            with turnstile:
                within.append(name)
                assert within == [name]
                order.append(name)
                time.sleep(0.0005)  # the other one comes meanwhile
                within.remove(name)

    threads = [Thread(target=step, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LATE_SECONDS)
    assert len(order) == 400
    both = order[: min(len(order) - order[::-1].index(name) for name in "ab")]  # until one has ended
    assert (
        sum(one != other for one, other in pairwise(both)) > len(both) / 2
    )  # a busy machine is late at times


def test_a_turn_that_fails_is_given_back() -> None:
    turnstile = Turnstile()
    with pytest.raises(KeyError), turnstile:
        raise KeyError("a step that fails")
    with turnstile:
        pass


def test_an_engine_has_its_turn_for_a_step_and_not_while_it_waits_for_a_move(monkeypatch) -> None:
    turnstile, turns = Turnstile(), []
    engine = make_engine(turnstile=turnstile)

    def is_free() -> bool:
        with turnstile:
            return True

    run, residency = engine._executable.run, engine.scheduler.residency
    note = lambda batch: turns.append(turnstile._is_taken) or run(batch)  # noqa: E731
    monkeypatch.setattr(engine._executable, "run", note)
    monkeypatch.setattr(residency, "wait", lambda seconds: turns.append(not is_free()))
    request_id = engine.add([1, 2, 3], SamplingParams(max_tokens=8))
    engine.step()
    engine.hold(request_id)
    engine.step()
    assert turns == [True, False]
    assert not turnstile._is_taken
