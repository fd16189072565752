from __future__ import annotations

import pytest

from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork
from fastserve.engine.verification_cost import VerificationCost

LINE = StepCost(fixed_seconds=0.008, decode_seconds=0.0002, draft_seconds=0.0005)
EIGHT = StepWork(decode_tokens=8)


def observed(cost: VerificationCost, num_drafts: int, seconds: float, *, times: int = 40) -> None:
    for _ in range(times):
        cost.observe(StepWork(decode_tokens=8, draft_tokens=num_drafts), seconds)


def test_before_anything_is_seen_it_is_the_line() -> None:
    cost = VerificationCost(OnlineStepCost(LINE))
    assert cost.curve(EIGHT, 2) == pytest.approx([0.0096, 0.0101, 0.0106])


def test_a_tile_that_begins_with_the_first_draft_is_learned_and_holds_beyond() -> None:
    cost = VerificationCost(OnlineStepCost(LINE))
    observed(cost, 0, 0.0096)
    observed(cost, 1, 0.0115)
    without, one, two = cost.curve(EIGHT, 2)
    assert without == pytest.approx(0.0096, rel=0.01)
    assert one == pytest.approx(0.0115, rel=0.02)
    assert two == pytest.approx(0.0115 + 0.0005 * 0.0115 / 0.0101, rel=0.02)


def test_steps_with_prompts_teach_nothing_and_a_disturbed_one_little() -> None:
    cost = VerificationCost(OnlineStepCost(LINE))
    before = cost.curve(EIGHT, 1)
    cost.observe(StepWork(prefill_tokens=100, decode_tokens=8), 5.0)
    assert cost.curve(EIGHT, 1) == before
    observed(cost, 0, 0.0096)
    observed(cost, 0, 3.0, times=1)
    assert cost.seconds(EIGHT, 0) < 1.1 * 0.0096


def test_what_was_dear_long_ago_is_thought_to_be_on_the_line_again() -> None:
    cost = VerificationCost(OnlineStepCost(LINE))
    observed(cost, 1, 0.02)
    assert cost.seconds(EIGHT, 1) > 0.019
    observed(cost, 0, 0.0096, times=2000)
    assert cost.seconds(EIGHT, 1) == pytest.approx(0.0101, rel=0.01)


def test_no_draft_is_thought_to_cost_nothing() -> None:
    cost = VerificationCost(OnlineStepCost(StepCost(fixed_seconds=0.01, decode_seconds=0, draft_seconds=0)))
    assert cost.seconds(EIGHT, 10) > 1.1 * cost.seconds(EIGHT, 0)
