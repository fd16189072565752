"""Least times are three quarters of what a sequence takes alone, and by no more than its kind are longer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.constraint import Choice
from fastserve.engine.cost import OnlineStepCost, StepCost, StepWork
from fastserve.engine.least_time import LeastTime
from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.sequence import Sequence
from fastserve.types import SamplingParams

COST = StepCost(
    fixed_seconds=0.01, prefill_seconds=0.001, decode_seconds=0.001, prefill_attended_seconds=1e-6
)
CHUNK = 64


def sequence_of(prompt: int, params: SamplingParams, *, produced: int = 0, computed: int = 0) -> Sequence:
    return Sequence(
        sequence_id=0,
        token_ids=[1] * (prompt + produced),
        num_prompt_tokens=prompt,
        max_tokens=params.max_tokens or 1000,
        params=params,
        arrival_seconds=0.0,
        num_computed_tokens=computed,
    )


def seconds_alone(sequence: Sequence, num_tokens: int) -> float:
    """Step by step, until it has so many tokens more."""
    seconds, computed, length = 0.0, sequence.num_computed_tokens, len(sequence.token_ids)
    while num_tokens:
        chunk = min(length - computed, CHUNK)
        work = StepWork.of_decode(computed + 1) if chunk == 1 else StepWork.of_prefill(chunk, computed)
        seconds += COST.seconds(work)
        computed += chunk
        if computed == length:
            length += 1
            num_tokens -= 1
    return seconds


def times_of(sequence: Sequence, lengths: int = 0) -> LeastTime:
    """As seen after a hundred completions of so many tokens."""
    work = ExpectedWork(OnlineStepCost(COST))
    for _ in range(100 if lengths else 0):
        ended = sequence_of(1, SamplingParams(), produced=lengths)
        ended.is_complete = True
        work.enter(ended)
        work.leave(ended)
    work.enter(sequence)
    return LeastTime(work, chunk_tokens=CHUNK)


@given(st.integers(1, 500), st.integers(0, 50), st.integers(1, 100), st.booleans())
def test_what_is_certain_is_three_quarters_of_what_it_takes_alone(prompt, produced, left, is_dropped) -> None:
    params = SamplingParams(max_tokens=produced + left, ignore_eos=True)
    computed = 0 if is_dropped or not produced else prompt + produced - 1
    sequence = sequence_of(prompt, params, produced=produced, computed=computed)
    least = times_of(sequence)
    assert least.certain(sequence) == pytest.approx(0.75 * seconds_alone(sequence, left), abs=0.003)
    assert least.to_next_token(sequence) == pytest.approx(0.75 * seconds_alone(sequence, 1), abs=0.003)
    assert least.likely(sequence) == pytest.approx(least.certain(sequence))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=100),
        SamplingParams(max_tokens=100, ignore_eos=True, stop="."),
        SamplingParams(max_tokens=100, ignore_eos=True, stop_token_ids=[3]),
        SamplingParams(max_tokens=100, constraint=Choice(["yes", "no"])),
    ],
)
def test_what_may_end_sooner_is_sure_of_one_token_alone_and_likely_to_have_those_of_its_kind(params) -> None:
    sequence = sequence_of(30, params)
    assert times_of(sequence).certain(sequence) == pytest.approx(0.75 * seconds_alone(sequence, 1), abs=0.002)
    for lengths, num_tokens in ((0, 1), (50, 50), (1000, 100)):
        likely = times_of(sequence, lengths).likely(sequence)
        assert likely == pytest.approx(0.75 * seconds_alone(sequence, num_tokens), abs=0.003)
