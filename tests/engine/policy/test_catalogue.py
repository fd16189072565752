"""What is said of policies is what they are made of."""

from __future__ import annotations

import pytest

from fastserve.engine.cost import OnlineStepCost, StepCost
from fastserve.engine.policy import (
    POLICY_NAMES,
    PolicyDescription,
    describe_policies,
    make_policy,
    parse_policy,
)
from fastserve.engine.policy.policy import Policy
from fastserve.engine.policy.work import ExpectedWork

WORK = ExpectedWork(OnlineStepCost(StepCost()))


def make(spec: str) -> Policy:
    return make_policy(spec, work=WORK, max_sequences=8)


def numbers(policy: Policy) -> dict[str, object]:
    return {name: value for name, value in vars(policy).items() if isinstance(value, int | float)}


def test_all_policies_are_described() -> None:
    assert tuple(policy.name for policy in describe_policies()) == POLICY_NAMES


@pytest.mark.parametrize("policy", describe_policies(), ids=lambda policy: policy.name)
def test_knobs_are_by_default_what_is_said(policy: PolicyDescription) -> None:
    given = [f"{knob.name}={knob.default:g}" for knob in policy.knobs if knob.default is not None]
    made, spelled_out = make(policy.name), make(f"{policy.name}:{','.join(given)}")
    assert made.name == policy.name
    assert numbers(made) == numbers(spelled_out)
    assert made.is_guarded == spelled_out.is_guarded == (policy.name != "mlfq-published")


@pytest.mark.parametrize("policy", describe_policies(), ids=lambda policy: policy.name)
def test_every_knob_changes_its_policy_within_its_bounds(policy: PolicyDescription) -> None:
    for knob in policy.knobs:
        default = knob.low if knob.default is None else knob.default
        assert knob.low <= default <= knob.high
        other = default + 1 if knob.is_integer else (knob.low + default) / 2 or knob.high / 2
        if knob.default is None:
            other = knob.high
        assert numbers(make(f"{policy.name}:{knob.name}={other:g}")) != numbers(make(policy.name))
        assert parse_policy(f"{policy.name}:{knob.name}={other:g}")[1] == {knob.name: pytest.approx(other)}
