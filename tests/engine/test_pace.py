from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork
from fastserve.engine.pace import SMALLEST_CHUNK_TOKENS, Pace, PrefillBudget
from fastserve.engine.sequence import Sequence

COST = StepCost(fixed_seconds=0.010, prefill_seconds=0.0005, decode_seconds=0.0005)
READING = StepCost(
    fixed_seconds=0.01, prefill_seconds=0.0005, decode_seconds=0.0005, prefill_attended_seconds=5e-7
)
DECODES = StepWork(decode_tokens=8)


def pace(cost: StepCost = COST, **options: float) -> Pace:
    return Pace(OnlineStepCost(cost), max_tokens=512, **options)


def chunk(
    chooser: Pace,
    *,
    backlog: int = 5000,
    longest: int | None = None,
    decodes: StepWork = DECODES,
    first_position: int = 0,
    slack: float = 0.0,
) -> int:
    """Tokens of a long prompt that a step takes."""
    longest = backlog if longest is None else longest
    budget = chooser.prefill_budget(decodes, backlog, longest_tokens=longest, slack_seconds=slack)
    return budget.fit(10_000, first_position)


def step_seconds(prefill_tokens: int, *, first_position: int = 0, cost: StepCost = COST) -> float:
    return cost.seconds(DECODES + StepWork.of_prefill(prefill_tokens, first_position))


def test_without_decodes_a_step_is_full_of_prompts() -> None:
    assert chunk(pace(), decodes=StepWork()) == 512


def test_the_target_gap_is_used_up_and_not_exceeded() -> None:
    tokens = chunk(pace(target_gap_seconds=0.1))
    assert step_seconds(tokens) <= 0.1 < step_seconds(tokens + 2)


def test_without_a_target_a_short_prompt_does_not_double_the_gap() -> None:
    decodes = StepWork(decode_tokens=30)
    prompt = StepWork.of_prefill(chunk(pace(), decodes=decodes, backlog=1000))
    assert 1.5 < COST.seconds(decodes + prompt) / COST.seconds(decodes) < 2


def test_a_long_backlog_is_granted_longer_steps_up_to_a_bound() -> None:
    steps = [step_seconds(chunk(pace(), backlog=n)) for n in (1000, 8000, 10**6)]
    assert steps[0] < steps[1] < steps[2] <= 0.2


def test_prompts_that_wait_behind_another_are_granted_longer_steps_than_one_that_is_as_long_as_all() -> None:
    alone, queued, crowded = (
        step_seconds(chunk(pace(), backlog=1600, longest=longest)) for longest in (1600, 800, 100)
    )
    assert alone == step_seconds(chunk(pace(), backlog=100))
    assert alone < queued < crowded <= 0.2


def test_steps_of_few_streams_are_as_long_as_nobody_notices() -> None:
    quick = StepCost(fixed_seconds=0.002, prefill_seconds=0.0005, decode_seconds=0.0001)
    tokens = chunk(pace(quick), backlog=100)
    assert quick.seconds(DECODES + StepWork.of_prefill(tokens)) == pytest.approx(0.03, abs=0.0006)


def test_prompts_go_on_however_tight_the_target_is() -> None:
    budget = pace(target_gap_seconds=0.001).prefill_budget(DECODES, 5000)
    assert budget.fit(100, 0) == SMALLEST_CHUNK_TOKENS
    budget.spend(SMALLEST_CHUNK_TOKENS, 0)
    assert budget.is_spent
    assert budget.fit(100, 0) == 0


def test_rows_of_decodes_are_never_given_away() -> None:
    assert chunk(pace(target_gap_seconds=60.0), decodes=StepWork(decode_tokens=510)) == 2


@given(st.integers(0, 20_000), st.floats(0.02, 0.3))
def test_late_tokens_of_a_prompt_read_more_keys_and_the_step_is_as_long(first_position, target) -> None:
    tokens = chunk(pace(READING, target_gap_seconds=target), first_position=first_position)
    if SMALLEST_CHUNK_TOKENS < tokens < 504:
        seconds = [step_seconds(tokens + n, first_position=first_position, cost=READING) for n in (0, 1)]
        assert seconds[0] <= target + 1e-9
        assert seconds[1] > target - 1e-9


def test_several_prompts_share_the_seconds_of_a_step_at_their_own_prices() -> None:
    budget = pace(READING, target_gap_seconds=0.1).prefill_budget(DECODES, 5000)
    budget.spend(50, 0)
    second = budget.fit(1000, 4000)
    work = DECODES + StepWork.of_prefill(50) + StepWork.of_prefill(second, 4000)
    assert READING.seconds(work) == pytest.approx(0.1, abs=0.003)


class Stream:
    """What the pace knows of one."""

    def __init__(self, chooser: Pace) -> None:
        self._pace = chooser
        self.now = 0.0
        self.sequence = Sequence(
            sequence_id=0, token_ids=[1], num_prompt_tokens=1, max_tokens=1000, arrival_seconds=0.0
        )
        self.sequence.last_token_seconds = 0.0

    @property
    def slack(self) -> float:
        return self.sequence.slack_seconds

    def step(self, prompt_tokens: int) -> float:
        """A step that takes what it may of a prompt; its seconds."""
        tokens = chunk(self._pace, backlog=prompt_tokens, slack=self.slack)
        seconds = step_seconds(min(prompt_tokens, tokens))
        self.now += seconds
        self._pace.give([self.sequence], self.now)
        self.sequence.last_token_seconds = self.now
        return seconds


def test_tokens_that_come_sooner_than_the_pace_give_slack_up_to_the_most_and_a_prompt_uses_it() -> None:
    stream = Stream(pace(target_gap_seconds=0.05, most_slack_seconds=0.1))
    for expected in (0.036, 0.072, 0.1, 0.1):
        stream.step(0)
        assert stream.slack == pytest.approx(expected)
    assert stream.step(1000) == pytest.approx(0.15, abs=0.001)
    assert stream.slack == pytest.approx(0.0, abs=0.001)
    assert stream.step(1000) == pytest.approx(0.05, abs=0.001)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=60), st.floats(0.0, 0.3))
def test_in_the_mean_no_token_comes_later_than_the_pace(prompts, most_slack) -> None:
    target = 0.04
    stream = Stream(pace(target_gap_seconds=target, most_slack_seconds=most_slack))
    for count, prompt in enumerate(prompts, 1):
        assert stream.step(prompt) <= target + most_slack + 1e-6
        assert stream.now <= target * count + 1e-6
        assert 0 <= stream.slack <= most_slack


def test_a_prompt_whose_tokens_cost_nothing_goes_on_by_the_smallest_chunk_where_the_time_is_over() -> None:
    free = StepCost(fixed_seconds=0.01, prefill_seconds=0.0)
    assert PrefillBudget(free, rows=512, seconds=-0.001).fit(10_000, 0) == SMALLEST_CHUNK_TOKENS
