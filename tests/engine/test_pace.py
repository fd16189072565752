from __future__ import annotations

import pytest

from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork
from fastserve.engine.pace import SMALLEST_CHUNK_TOKENS, Pace

COST = StepCost(fixed_seconds=0.010, prefill_seconds=0.0005, decode_seconds=0.0005)
DECODES = StepWork(decode_tokens=8)


def pace(*, target_gap_seconds: float | None = None) -> Pace:
    return Pace(OnlineStepCost(COST), max_tokens=512, target_gap_seconds=target_gap_seconds)


def step_seconds(prefill_tokens: int) -> float:
    return COST.seconds(DECODES + StepWork(prefill_tokens=prefill_tokens))


def test_without_decodes_a_step_is_full_of_prompts() -> None:
    assert pace().prefill_tokens(StepWork(), backlog_tokens=5000) == 512


def test_the_target_gap_is_used_up_and_not_exceeded() -> None:
    tokens = pace(target_gap_seconds=0.1).prefill_tokens(DECODES, backlog_tokens=5000)
    assert step_seconds(tokens) <= 0.1 < step_seconds(tokens + 2)


def test_without_a_target_a_short_prompt_does_not_double_the_gap() -> None:
    tokens = pace().prefill_tokens(DECODES, backlog_tokens=1000)
    assert 1.5 < step_seconds(tokens) / COST.seconds(DECODES) < 2


def test_a_long_backlog_is_granted_longer_steps_up_to_a_bound() -> None:
    steps = [step_seconds(pace().prefill_tokens(DECODES, backlog_tokens=n)) for n in (1000, 8000, 10**6)]
    assert steps[0] < steps[1] < steps[2] <= 0.2


def test_prompts_go_on_however_tight_the_target_is() -> None:
    assert pace(target_gap_seconds=0.001).prefill_tokens(DECODES, 5000) == SMALLEST_CHUNK_TOKENS


def test_rows_of_decodes_are_never_given_away() -> None:
    decodes = StepWork(decode_tokens=510)
    assert pace(target_gap_seconds=60.0).prefill_tokens(decodes, 5000) == 2


def test_late_tokens_of_a_prompt_read_more_keys_and_so_are_fewer() -> None:
    cost = StepCost(fixed_seconds=0.01, prefill_seconds=0.0005, decode_seconds=0.0005, attended_seconds=5e-7)
    chooser = Pace(OnlineStepCost(cost), max_tokens=512, target_gap_seconds=0.1)
    early = chooser.prefill_tokens(DECODES, 5000)
    late = chooser.prefill_tokens(DECODES, 5000, first_position=3000)
    assert late == pytest.approx(early / 2, abs=1)
