"""Budgets: what a compressed model may weigh, lose and take, as one line of text.

size<=60MB quality>=-1% decode<=8ms
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from fastserve.errors import OptionError
from fastserve.types import JsonObject

_SIZES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_SHARE = {"%": 0.01}


@dataclass(frozen=True, slots=True)
class _Kind:
    """What can be limited: how it is compared, and its units with what each is times the unit we keep."""

    operator: str
    units: Mapping[str, float]
    what: str


KINDS: Mapping[str, _Kind] = {
    "size": _Kind("<=", {**_SIZES, **_SHARE}, "bytes of the weights on the disk, or a share of the source's"),
    "memory": _Kind("<=", _SIZES, "most bytes of a process that runs the model"),
    "quality": _Kind(">=", _SHARE, "change of the main metric as a share of the source's, below 0 is worse"),
    "kl": _Kind("<=", {"": 1.0}, "mean KL divergence of predictions from the source's, in nats"),
    "agreement": _Kind(">=", _SHARE, "how often the likeliest token or label is the source's"),
    "decode": _Kind("<=", _TIMES, "time of a token after the first"),
    "prefill": _Kind("<=", _TIMES, "time of a prompt of 128 tokens up to its first token"),
    "latency": _Kind("<=", _TIMES, "time of one text of 64 tokens, of encoders"),
}
NEED_DATA = frozenset({"quality", "kl", "agreement"})

_TERM = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|==|=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*([A-Za-z%]*)[\s,;]*")
_EXAMPLE = 'write such as "size<=60MB quality>=-1% decode<=8ms"'


@dataclass(frozen=True, slots=True)
class Limit:
    """One term. `value` is in bytes, milliseconds, or a share; `is_share` of a size that is one."""

    text: str
    name: str
    value: float
    is_share: bool = False

    def is_met(self, actual: float) -> bool:
        return actual <= self.value if KINDS[self.name].operator == "<=" else actual >= self.value

    def excess(self, actual: float) -> float:
        """By how much it is missed, as a share of the limit (of a quality: of the whole); 0 where it is
        met."""
        if self.is_met(actual):
            return 0.0
        scale = abs(self.value) if KINDS[self.name].operator == "<=" and self.value else 1.0
        return abs(actual - self.value) / scale


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a limit."""

    limit: Limit
    actual: float

    @property
    def is_met(self) -> bool:
        return self.limit.is_met(self.actual)

    @property
    def text(self) -> str:
        """`size<=60MB: 58.2 MB`, as people read it."""
        return f"{self.limit.text}: {_format(self.limit, self.actual)}"

    def to_json(self) -> JsonObject:
        return {
            "limit": self.limit.text,
            "name": self.limit.name,
            "most" if KINDS[self.limit.name].operator == "<=" else "least": self.limit.value,
            "actual": self.actual,
            "is_met": self.is_met,
        }


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits, all of which are to be met."""

    text: str
    limits: tuple[Limit, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(limit.name for limit in self.limits)

    def check(self, measured: Mapping[str, float]) -> tuple[Verdict, ...]:
        """Of values by name; a `size` that is a share is of `source_size`."""
        return tuple(
            Verdict(
                limit,
                measured["size"] / measured["source_size"] if limit.is_share else measured[limit.name],
            )
            for limit in self.limits
        )

    def excess(self, measured: Mapping[str, float]) -> float:
        """The sum of what all limits are missed by; 0 where all are met."""
        return sum(verdict.limit.excess(verdict.actual) for verdict in self.check(measured))


def parse_budget(text: str) -> Budget:
    """
    >>> [limit.value for limit in parse_budget("size<=60MB quality>=-1% decode<=8ms").limits]
    [60000000.0, -0.01, 8.0]

    Raises:
        OptionError: a term is none, or has a name, comparison or unit that it cannot have.
    """
    limits: list[Limit] = []
    position = 0
    while position < len(text.rstrip()):
        found = _TERM.match(text, position)
        if found is None:
            raise _refuse(f"{text[position:].strip()!r} is no limit", _EXAMPLE)
        limits.append(_limit(*found.groups()))
        position = found.end()
    if not limits:
        raise _refuse("there is no limit", _EXAMPLE)
    for index, limit in enumerate(limits):
        if limit.name in (other.name for other in limits[:index]):
            raise _refuse(f"{limit.name} is limited twice", "keep the stricter limit")
    return Budget(" ".join(text.split()), tuple(limits))


def _limit(name: str, operator: str, number: str, unit: str) -> Limit:
    if name not in KINDS:
        near = get_close_matches(name.lower(), KINDS, n=2)
        all_of_them = ", ".join(f"{known}{kind.operator}" for known, kind in KINDS.items())
        hint = f"did you mean {' or '.join(near)}?" if near else f"limits are {all_of_them}"
        raise _refuse(f"{name!r} cannot be limited", hint)
    kind = KINDS[name]
    text = f"{name}{operator}{number}{unit}"
    if operator != kind.operator:
        raise _refuse(
            f"{text!r} compares by {operator}", f"write {name}{kind.operator}{number}{unit}: {kind.what}"
        )
    units = {known.lower(): factor for known, factor in kind.units.items()}
    if unit.lower() not in units:
        said = f"the unit {unit!r}" if unit else "no unit"
        hint = f"units are {', '.join(kind.units)}" if "" not in kind.units else "leave the unit out"
        raise _refuse(f"{text!r} has {said}", hint)
    value = float(number) * units[unit.lower()]
    if value < 0 and name != "quality":
        raise _refuse(f"{text!r} is below 0", f"it is {kind.what}")
    if name == "quality" and value > 1:
        raise _refuse(f"{text!r} asks for twice as good", f"it is the {kind.what}")
    return Limit(text, name, value, is_share=name == "size" and unit == "%")


def _format(limit: Limit, value: float) -> str:
    if limit.name in ("decode", "prefill", "latency"):
        return f"{value:.3g} ms"
    if limit.name == "kl":
        return f"{value:.4f}"
    if limit.name in ("size", "memory") and not limit.is_share:
        return f"{value / 1e6:.2f} MB"
    return f"{value:+.2%}" if limit.name == "quality" else f"{value:.2%}"


def _refuse(what: str, hint: str) -> OptionError:
    return OptionError(f"budget: {what}", hint=hint, option="budget")
