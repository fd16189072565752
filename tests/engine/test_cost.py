from __future__ import annotations

import random
from dataclasses import astuple

import pytest

from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork

TRUE = StepCost(
    fixed_seconds=0.012,
    prefill_seconds=0.0004,
    decode_seconds=0.0011,
    attended_seconds=6e-7,
    prefill_attended_seconds=2e-7,
    prefill_fixed_seconds=0.003,
)


def random_work(rng: random.Random) -> StepWork:
    work = sum((StepWork.of_decode(rng.randint(1, 3000)) for _ in range(rng.randint(0, 40))), StepWork())
    if rng.random() < 0.5:
        work += StepWork.of_prefill(rng.randint(1, 400), rng.randint(0, 2000))
    return work


def test_a_prompts_rows_read_the_keys_before_them_and_their_own() -> None:
    whole = StepWork.of_prefill(100)
    parts = StepWork.of_prefill(60) + StepWork.of_prefill(40, first_position=60)
    assert whole == parts == StepWork(prefill_tokens=100, prefill_attended_tokens=sum(range(1, 101)))


def test_the_fit_comes_to_the_coefficients_that_made_the_steps() -> None:
    rng = random.Random(1)
    cost = OnlineStepCost(StepCost())
    for _ in range(400):
        work = random_work(rng)
        cost.observe(work, TRUE.seconds(work) * rng.uniform(0.9, 1.1))
    for _ in range(50):
        work = random_work(rng)
        assert cost.seconds(work) == pytest.approx(TRUE.seconds(work), rel=0.1)


def test_the_fit_follows_a_machine_that_has_become_slower() -> None:
    rng = random.Random(2)
    cost = OnlineStepCost(TRUE)
    for _ in range(3000):
        work = random_work(rng)
        cost.observe(work, 2 * TRUE.seconds(work))
    work = StepWork.of_decode(100)
    assert cost.seconds(work) == pytest.approx(2 * TRUE.seconds(work), rel=0.1)


def test_a_step_that_was_disturbed_for_long_counts_for_little() -> None:
    rng = random.Random(3)
    cost = OnlineStepCost(TRUE)
    for index in range(600):
        work = random_work(rng)
        cost.observe(work, 30.0 if index % 100 == 99 else TRUE.seconds(work))
    work = StepWork.of_decode(100)
    assert cost.seconds(work) < 1.5 * TRUE.seconds(work)


def test_no_coefficient_is_ever_negative() -> None:
    rng = random.Random(4)
    cost = OnlineStepCost(StepCost())
    for _ in range(200):
        cost.observe(random_work(rng), rng.uniform(0.0, 0.1))
        assert min(astuple(cost.model)) >= 0


def test_a_draft_costs_a_prompts_row_until_drafts_were_verified() -> None:
    true = StepCost(fixed_seconds=0.01, prefill_seconds=0.0004, decode_seconds=0.001, draft_seconds=0.0002)
    rng = random.Random(3)
    cost = OnlineStepCost(StepCost())
    for _ in range(300):
        work = StepWork(prefill_tokens=rng.choice([0, 0, 64]), decode_tokens=rng.randint(1, 8))
        cost.observe(work, true.seconds(work))
    assert cost.model.draft_seconds == cost.model.prefill_seconds == pytest.approx(0.0004, rel=0.05)
    for _ in range(100):
        work = StepWork(decode_tokens=rng.randint(1, 8), draft_tokens=rng.randint(0, 8))
        cost.observe(work, true.seconds(work))
    assert cost.model.draft_seconds == pytest.approx(0.0002, rel=0.1)


def test_a_decode_shares_a_steps_fixed_cost_among_as_many_as_the_first_steps_had() -> None:
    cost = OnlineStepCost(StepCost(fixed_seconds=0.01, decode_seconds=0.0))
    for _ in range(5):
        cost.observe(StepWork(decode_tokens=10), 0.01)
    assert cost.share_seconds(0.01) == pytest.approx(0.001)
