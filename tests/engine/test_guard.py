from __future__ import annotations

from fastserve.engine.guard import Guard
from fastserve.engine.sequence import Sequence


def served(seconds: float, *, evictions: int = 0, before: float = 0.0) -> Sequence:
    """A sequence that has been served so long since it came into the fast pool, and before."""
    return Sequence(
        sequence_id=0,
        token_ids=[1],
        num_prompt_tokens=1,
        max_tokens=1,
        arrival_seconds=0.0,
        attained_seconds=before + seconds,
        resident_seconds=seconds,
        num_evictions=evictions,
    )


def test_a_stay_must_have_earned_what_its_end_costs() -> None:
    assert Guard().allows(served(0.4), 0.1, now=0.0)
    assert not Guard().allows(served(0.39), 0.1, now=0.0)


def test_each_stay_is_as_long_as_all_before_so_that_evictions_grow_with_the_logarithm() -> None:
    assert not Guard().allows(served(0.9, evictions=1, before=1.0), 0.01, now=0.0)
    assert Guard().allows(served(1.0, evictions=1, before=1.0), 0.01, now=0.0)
    guard, attained, evictions = Guard(), 0.0, 0
    stay = 0.0
    for step in range(10_000):
        attained, stay = attained + 0.01, stay + 0.01
        if guard.allows(served(stay, evictions=evictions, before=attained - stay), 0.001, now=0.01 * step):
            guard.spend(0.001)
            evictions, stay = evictions + 1, 0.0
    assert evictions <= 16


def test_evictions_take_at_most_a_tenth_of_the_time() -> None:
    guard, spent = Guard(), 0.0
    for step in range(10_000):
        if guard.allows(served(100.0), 0.05, now=0.01 * step):
            guard.spend(0.05)
            spent += 0.05
    assert 9.0 < spent <= 0.1 * 100 + 2.0


def test_a_clock_that_jumps_back_earns_nothing() -> None:
    guard = Guard()
    guard.allows(served(1.0), 0.1, now=100.0)
    guard.spend(2.0)
    assert not guard.allows(served(1.0), 0.1, now=0.0)
