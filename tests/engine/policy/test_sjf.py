from __future__ import annotations

from fastserve.engine.cost import OnlineStepCost, StepCost
from fastserve.engine.policy.sjf import Sjf
from fastserve.engine.sequence import Sequence

COST = StepCost(fixed_seconds=0.01, prefill_seconds=0.001, decode_seconds=0.002)


def entered(
    policy: Sjf, prompt: int, *, produced: int = 0, max_tokens: int = 1000, tenant: str = ""
) -> Sequence:
    sequence = Sequence(
        sequence_id=0,
        token_ids=[1] * (prompt + produced),
        num_prompt_tokens=prompt,
        max_tokens=max_tokens,
        arrival_seconds=0.0,
        tenant=tenant,
        num_computed_tokens=max(prompt + produced - 1, 0) if produced else 0,
    )
    policy.enter(sequence, 0.0)
    return sequence


def work(sequence: Sequence) -> float:
    return sequence.rank[0]


def test_work_is_what_is_left_of_the_prompt_and_of_the_output_to_be_expected() -> None:
    policy = Sjf(OnlineStepCost(COST))
    assert work(entered(policy, 100, max_tokens=10)) == 100 * 0.001 + 10 * 0.002
    assert work(entered(policy, 100, produced=4, max_tokens=10)) == 6 * 0.002


def test_a_sequence_beyond_what_is_expected_counts_as_half_done() -> None:
    policy = Sjf(OnlineStepCost(COST))
    assert work(entered(policy, 10, produced=400)) == 400 * 0.002


def test_the_lengths_of_a_tenants_completions_are_learned_for_it_alone() -> None:
    policy = Sjf(OnlineStepCost(COST))
    for _ in range(300):
        ended = entered(policy, 10, produced=5, tenant="brief")
        ended.is_complete = True
        policy.leave(ended)
        policy.leave(entered(policy, 10, produced=400, tenant="brief"))  # given up
    assert work(entered(policy, 10, tenant="brief")) < 10 * 0.001 + 7 * 0.002
    assert work(entered(policy, 10, tenant="other")) > 10 * 0.001 + 100 * 0.002


def test_memory_is_taken_from_what_has_twice_the_work_left() -> None:
    policy = Sjf(OnlineStepCost(COST))
    short, medium, long = (entered(policy, 10, max_tokens=n) for n in (10, 20, 50))
    assert policy.outranks(short, long)
    assert not policy.outranks(short, medium)
