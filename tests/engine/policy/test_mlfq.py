"""The skip-join multi-level feedback queue, a sequence at a time. Quanta here are 10, 20, 40, 80 ...
milliseconds."""

from __future__ import annotations

import pytest

from fastserve.engine.cost import OnlineStepCost, StepCost
from fastserve.engine.policy.mlfq import Mlfq
from fastserve.engine.sequence import Sequence

COST = StepCost(fixed_seconds=0.009, prefill_seconds=0.001, decode_seconds=0.001)


def make(**knobs: object) -> Mlfq:
    return Mlfq(OnlineStepCost(COST), max_sequences=4, **knobs)


def entered(policy: Mlfq, prompt_tokens: int, *, sequence_id: int = 0, now: float = 0.0) -> Sequence:
    sequence = Sequence(
        sequence_id=sequence_id,
        token_ids=[1] * prompt_tokens,
        num_prompt_tokens=prompt_tokens,
        max_tokens=100,
        arrival_seconds=now,
    )
    policy.enter(sequence, now)
    return sequence


@pytest.mark.parametrize(("prompt_tokens", "level"), [(5, 0), (9, 0), (11, 1), (19, 1), (10**6, 17)])
def test_a_sequence_joins_the_first_level_whose_quantum_covers_its_prompt(prompt_tokens, level) -> None:
    assert entered(make(), prompt_tokens).standing.level == level


def test_it_sinks_a_level_when_it_has_had_the_quantum() -> None:
    policy = make()
    sequence = entered(policy, 5)
    sequence.num_computed_tokens = 5
    levels = []
    for step in range(16):
        policy.serve([sequence], 0.01, now=0.01 * step)
        levels.append(sequence.standing.level)
    assert levels == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4]


def test_a_prompt_that_is_computed_in_chunks_beside_others_keeps_its_level_until_it_is_done() -> None:
    policy = make()
    sequence = entered(policy, 100)
    for computed in (30, 60, 90):
        sequence.num_computed_tokens = computed
        policy.serve([sequence], 0.5, now=computed)
        assert sequence.standing.level == 4
    sequence.num_computed_tokens = 100
    policy.serve([sequence], 0.5, now=100.0)
    assert sequence.standing.level == 5


def test_who_waits_beyond_the_starvation_limit_comes_to_the_first_level() -> None:
    policy = make(starvation_seconds=1.0)
    waiting, running = entered(policy, 100), entered(policy, 100, sequence_id=1)
    policy.serve([running], 0.01, now=0.9)
    policy.refresh([waiting, running], now=1.0)
    assert waiting.standing.level == 4
    policy.refresh([waiting, running], now=1.1)
    assert (waiting.standing.level, running.standing.level) == (0, 4)
    assert waiting.rank < running.rank


def test_who_was_promoted_goes_first_and_takes_nobodys_memory_unless_as_published() -> None:
    for is_guarded in (True, False):
        policy = make(starvation_seconds=1.0, is_guarded=is_guarded)
        starved, resident = entered(policy, 5), entered(policy, 2000, sequence_id=1, now=1.5)
        assert policy.outranks(starved, resident)
        policy.refresh([starved, resident], now=2.0)
        assert starved.rank < resident.rank
        assert policy.outranks(starved, resident) != is_guarded


def test_who_waits_for_its_reader_does_not_starve() -> None:
    policy = make(starvation_seconds=1.0)
    held = entered(policy, 2000)
    level = held.standing.level
    held.is_held = True
    for tenth in range(50):
        policy.refresh([held], now=0.1 * tenth)
    held.is_held = False
    policy.refresh([held], now=5.5)
    assert held.standing.level == level
    policy.refresh([held], now=6.5)
    assert held.standing.level == 0


def test_a_newcomer_that_skipped_levels_is_not_taken_for_one_that_starves() -> None:
    policy = make(starvation_seconds=1.0)
    sequence = entered(policy, 100, now=50.0)
    policy.refresh([sequence], now=50.5)
    assert sequence.standing.level == 4


def test_within_a_level_the_first_to_join_goes_first() -> None:
    policy = make()
    first, second = entered(policy, 5, now=1.0), entered(policy, 5, sequence_id=1, now=2.0)
    assert first.rank < second.rank
    first.num_computed_tokens = second.num_computed_tokens = 5
    policy.serve([second], 0.01, now=3.0)
    policy.serve([first], 0.01, now=4.0)
    assert second.rank < first.rank


def test_memory_is_taken_by_the_margin_only_and_as_published_by_any_better_level() -> None:
    for margin, expected in ((1, [False, True, True]), (2, [False, False, True])):
        policy = make(margin=margin, is_guarded=margin > 1)
        newcomer = entered(policy, 5)
        residents = [entered(policy, tokens, sequence_id=tokens) for tokens in (6, 19, 39)]
        assert [policy.outranks(newcomer, resident) for resident in residents] == expected


def test_who_leaves_first_is_who_comes_last_or_is_promoted_last() -> None:
    policy = make(starvation_seconds=1.0)
    near = entered(policy, 5)
    far = [entered(policy, 2000, sequence_id=n) for n in (1, 2)]
    others = [entered(policy, 40, sequence_id=n) for n in range(3, 30)]
    policy.serve([far[1]], 0.01, now=0.5)  # has just run: it is promoted later than its twin
    policy.refresh([near, *far, *others], now=0.5)
    assert policy.departures([near, *far], now=0.5) == [far[1], far[0], near]


def test_from_another_policy_a_sequence_comes_to_the_level_of_what_it_has_had() -> None:
    policy = make()
    sequence = entered(make(), 5)
    sequence.num_computed_tokens, sequence.attained_seconds = 5, 0.15
    policy.enter(sequence, now=9.0)
    assert sequence.standing.level == 4
