from __future__ import annotations

import pytest

from fastserve.engine.acceptance import Acceptance


def test_nothing_is_expected_of_guesses_before_any_has_come_true() -> None:
    acceptance = Acceptance(memory=100, prior=Acceptance(memory=100))
    assert [acceptance.rate(length) for length in (1, 2, 8, 1000)] == [0.0] * 4


def test_the_rate_comes_to_the_share_of_right_guesses() -> None:
    acceptance = Acceptance(memory=1000)
    for index in range(2000):
        acceptance.observe(5, index % 4 > 0)
    assert acceptance.rate(5) == pytest.approx(0.75, abs=0.01)


def test_longer_matches_are_expected_to_do_as_well_until_they_are_known() -> None:
    acceptance = Acceptance(memory=100)
    for _ in range(50):
        acceptance.observe(4, True)
    assert acceptance.rate(100) == pytest.approx(acceptance.rate(4))
    assert acceptance.rate(2) == 0.0
    for _ in range(50):
        acceptance.observe(100, False)
    assert acceptance.rate(100) < 0.1 < 0.9 < acceptance.rate(4)


def test_a_sequence_starts_from_what_others_have_shown_and_learns_its_own() -> None:
    engine = Acceptance(memory=300)
    for _ in range(300):
        engine.observe(4, True)
    sequence = Acceptance(memory=30, prior=engine)
    assert sequence.rate(4) == engine.rate(4)
    for _ in range(10):
        sequence.observe(4, False)
    assert sequence.rate(4) < 0.3
    assert engine.rate(4) > 0.9


def test_what_is_long_ago_is_forgotten() -> None:
    acceptance = Acceptance(memory=20)
    for _ in range(1000):
        acceptance.observe(2, True)
    for _ in range(60):
        acceptance.observe(2, False)
    assert acceptance.rate(2) < 0.1
