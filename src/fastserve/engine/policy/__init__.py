"""Scheduling policies, one small file each, and how they are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

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
    meaning: str  # a line for people
    is_integer: bool = False


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a policy is made: of what it reads, which `arguments` says, and of the values of some knobs; the
    others are as in `presets`, or as its class has them."""

    make: Callable[..., Policy]
    meaning: str
    arguments: Callable[[ExpectedWork, int], Mapping[str, Any]]
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    presets: Mapping[str, Any] = field(default_factory=dict)

    def default_of(self, knob: str) -> float | None:
        default: float | None = self.presets.get(knob, signature(self.make).parameters[knob].default)
        return default


_LEVELS: Mapping[str, Knob] = {
    "quantum_seconds": Knob(1e-4, 60.0, "service at the first level; by default that of the least step"),
    "growth": Knob(1.1, 16.0, "of the quantum, from level to level"),
    "starvation_seconds": Knob(0.01, 3600.0, "who waits longer comes to the first level again"),
}

_POLICIES: Mapping[str, _Recipe] = {
    "fcfs": _Recipe(Fcfs, "first come, first served", lambda work, most: {}),
    "priority": _Recipe(
        Priority,
        "by the number that requests have, the lower first",
        lambda work, most: {},
        {"margin": Knob(1, 1000, "memory is taken for what is better by so much", is_integer=True)},
    ),
    "sjf": _Recipe(
        Sjf,
        "least work first, by the prompt and the mean length of the tenant's completions",
        lambda work, most: {"cost": work.cost},
        {"margin": Knob(1.0, 1000.0, "memory is taken of what has so many times the work left")},
    ),
    "mlfq": _Recipe(
        Mlfq,
        "levels with growing quanta; whoever has had its quantum sinks",
        lambda work, most: {"cost": work.cost, "max_sequences": most},
        {
            **_LEVELS,
            "margin": Knob(1, 24, "memory is taken for what is better by so many levels", is_integer=True),
        },
    ),
    "hrrn": _Recipe(
        Hrrn, "by how long a request has waited for the work that it is", lambda work, most: {"work": work}
    ),
    "gittins": _Recipe(
        Gittins,
        "by the completions to be expected for the work, as lengths so far tell",
        lambda work, most: {"work": work},
        {"margin": Knob(1.0, 1000.0, "memory is taken of what is so many times worse")},
    ),
    "boost": _Recipe(
        Boost,
        "in order of arrival, brought forward by how little work is expected",
        lambda work, most: {"work": work, "max_sequences": most},
        {
            "strength": Knob(0.0, 100.0, "how far short work is brought forward under load"),
            "patience": Knob(0.0, 1000.0, "how much longer than by arrival somebody may wait"),
            "least_scale_seconds": Knob(1e-3, 3600.0, "the scale while nobody waits"),
            "most_scale_seconds": Knob(1e-3, 1e6, "the largest scale"),
            "most_boost": Knob(0.1, 100.0, "the largest boost, in scales"),
            "express_seconds": Knob(0.0, 3600.0, "prompts that take less are read at once"),
            "margin": Knob(0.0, 100.0, "memory is taken of what is so many scales later"),
        },
    ),
    "mlfq-published": _Recipe(
        Mlfq,
        "mlfq as published, where any better level takes memory at any price",
        lambda work, most: {"cost": work.cost, "max_sequences": most},
        _LEVELS,
        {"starvation_seconds": 0.3, "margin": 1, "is_guarded": False},
    ),
}

POLICY_NAMES = tuple(_POLICIES)


def make_policy(spec: str, *, work: ExpectedWork, max_sequences: int) -> Policy:
    """The policy that a text names: `NAME`, or `NAME:KNOB=VALUE,...`.

    >>> from fastserve.engine.cost import OnlineStepCost, StepCost
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
    recipe = _POLICIES[name]
    return recipe.make(**{**recipe.arguments(work, max_sequences), **recipe.presets, **knobs})


def parse_policy(spec: str) -> tuple[str, dict[str, float]]:
    """The name of a policy and the values of its knobs. Raises as make_policy."""
    name, _, text = spec.partition(":")
    if name not in _POLICIES:
        raise OptionError(f"policy {name!r} is unknown", hint=f"choose one of {', '.join(_POLICIES)}")
    known = _POLICIES[name].knobs
    knobs: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        knob_name, _, value = part.partition("=")
        if knob_name not in known:
            hint = f"it has {', '.join(known)}" if known else "it has none"
            raise OptionError(f"policy {name!r} has no knob {knob_name!r}", hint=hint)
        knobs[knob_name] = _parse_knob(f"{knob_name} of policy {name!r}", value, known[knob_name])
    return name, knobs


@dataclass(frozen=True, slots=True)
class KnobDescription:
    """A number that a policy takes: what it may be, and what it is by default; None: that follows the
    machine."""

    name: str
    meaning: str
    low: float
    high: float
    is_integer: bool
    default: float | None


@dataclass(frozen=True, slots=True)
class PolicyDescription:
    """A policy as people choose it: `NAME`, or `NAME:KNOB=VALUE,...`."""

    name: str
    meaning: str
    knobs: Seq[KnobDescription]


def describe_policies() -> list[PolicyDescription]:
    """All that there are.

    >>> [policy.name for policy in describe_policies()][0]
    'fcfs'
    """
    return [
        PolicyDescription(
            name,
            recipe.meaning,
            [
                KnobDescription(
                    knob_name,
                    knob.meaning,
                    knob.low,
                    knob.high,
                    knob.is_integer,
                    recipe.default_of(knob_name),
                )
                for knob_name, knob in recipe.knobs.items()
            ],
        )
        for name, recipe in _POLICIES.items()
    ]


def _parse_knob(name: str, text: str, knob: Knob) -> float:
    try:
        value = int(text) if knob.is_integer else float(text)
    except ValueError:
        kind = "a whole number" if knob.is_integer else "a number"
        raise OptionError(f"{name} is {text!r}", hint=f"give {kind}") from None
    check_number(name, value, knob.low, knob.high)
    return value
