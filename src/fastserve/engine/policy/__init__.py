"""Scheduling policies, one small file each, and how they are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastserve.engine.cost import OnlineStepCost
from fastserve.engine.policy.boost import Boost
from fastserve.engine.policy.fcfs import Fcfs
from fastserve.engine.policy.gittins import Gittins
from fastserve.engine.policy.hrrn import Hrrn
from fastserve.engine.policy.mlfq import Mlfq
from fastserve.engine.policy.policy import Policy
from fastserve.engine.policy.priority import Priority
from fastserve.engine.policy.sjf import Sjf
from fastserve.engine.policy.work import ExpectedWork
from fastserve.errors import OptionError
from fastserve.option import check_number


@dataclass(frozen=True, slots=True)
class Knob:
    """A number that a policy takes, and its range."""

    low: float
    high: float
    is_integer: bool = False


def _make_mlfq(
    cost: OnlineStepCost, max_sequences: int, knobs: Mapping[str, float], *, is_guarded: bool
) -> Mlfq:
    return Mlfq(
        cost,
        max_sequences=max_sequences,
        quantum_seconds=knobs.get("quantum_seconds"),
        growth=knobs.get("growth", 2.0),
        starvation_seconds=knobs.get("starvation_seconds", 10.0 if is_guarded else 0.3),
        margin=int(knobs.get("margin", 2 if is_guarded else 1)),
        is_guarded=is_guarded,
    )


_MLFQ_KNOBS: Mapping[str, Knob] = {
    "quantum_seconds": Knob(1e-4, 60.0),
    "growth": Knob(1.1, 16.0),
    "starvation_seconds": Knob(0.01, 3600.0),
}

# By name: its knobs, and how it is made with the values of some.
_POLICIES: Mapping[
    str, tuple[Mapping[str, Knob], Callable[[ExpectedWork, int, dict[str, float]], Policy]]
] = {
    "fcfs": ({}, lambda work, most, knobs: Fcfs()),
    "priority": (
        {"margin": Knob(1, 1000, is_integer=True)},
        lambda work, most, knobs: Priority(margin=int(knobs.get("margin", 1))),
    ),
    "sjf": ({"margin": Knob(1.0, 1000.0)}, lambda work, most, knobs: Sjf(work.cost, **knobs)),
    "mlfq": (
        {**_MLFQ_KNOBS, "margin": Knob(1, 24, is_integer=True)},
        lambda work, most, knobs: _make_mlfq(work.cost, most, knobs, is_guarded=True),
    ),
    "hrrn": ({}, lambda work, most, knobs: Hrrn(work)),
    "gittins": (
        {"margin": Knob(1.0, 1000.0)},
        lambda work, most, knobs: Gittins(work, **knobs),
    ),
    "boost": (
        {
            "strength": Knob(0.0, 100.0),
            "patience": Knob(0.0, 1000.0),
            "least_scale_seconds": Knob(1e-3, 3600.0),
            "most_scale_seconds": Knob(1e-3, 1e6),
            "most_boost": Knob(0.1, 100.0),
            "express_seconds": Knob(0.0, 3600.0),
            "margin": Knob(0.0, 100.0),
        },
        lambda work, most, knobs: Boost(work, max_sequences=most, **knobs),
    ),
    "mlfq-published": (
        _MLFQ_KNOBS,
        lambda work, most, knobs: _make_mlfq(work.cost, most, knobs, is_guarded=False),
    ),
}

POLICY_NAMES = tuple(_POLICIES)


def make_policy(spec: str, *, work: ExpectedWork, max_sequences: int) -> Policy:
    """The policy that a text names: `NAME`, or `NAME:KNOB=VALUE,...`.

    >>> from fastserve.engine.cost import StepCost
    >>> work = ExpectedWork(OnlineStepCost(StepCost()))
    >>> make_policy("mlfq:growth=4", work=work, max_sequences=8).name
    'mlfq'

    Args:
        work: what is expected of sequences, and what a step costs; policies read it.
        max_sequences: most sequences of one step.

    Raises:
        OptionError: an unknown policy or knob, or a value out of its range.
    """
    name, knobs = parse_policy(spec)
    return _POLICIES[name][1](work, max_sequences, knobs)


def parse_policy(spec: str) -> tuple[str, dict[str, float]]:
    """The name of a policy and the values of its knobs. Raises as make_policy."""
    name, _, text = spec.partition(":")
    if name not in _POLICIES:
        raise OptionError(f"policy {name!r} is unknown", hint=f"choose one of {', '.join(_POLICIES)}")
    known = _POLICIES[name][0]
    knobs: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        knob_name, _, value = part.partition("=")
        if knob_name not in known:
            hint = f"it has {', '.join(known)}" if known else "it has none"
            raise OptionError(f"policy {name!r} has no knob {knob_name!r}", hint=hint)
        knobs[knob_name] = _parse_knob(f"{knob_name} of policy {name!r}", value, known[knob_name])
    return name, knobs


def _parse_knob(name: str, text: str, knob: Knob) -> float:
    try:
        value = float(int(text)) if knob.is_integer else float(text)
    except ValueError:
        kind = "a whole number" if knob.is_integer else "a number"
        raise OptionError(f"{name} is {text!r}", hint=f"give {kind}") from None
    check_number(name, value, knob.low, knob.high)
    return value
