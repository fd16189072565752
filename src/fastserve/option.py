"""Checks of single options: each raises OptionError with the option's name, its value and what it may be."""

from __future__ import annotations

from numbers import Integral, Real

from fastserve.errors import OptionError

INT32_MAX = 2**31 - 1  # of counts and token ids, which backends read as int32
INT64_MAX = 2**63 - 1  # of bytes


def check_integer(name: str, value: object, *, low: int, high: int = INT32_MAX) -> None:
    """Raise OptionError unless `value` is a whole number, low <= value <= high. True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(
            f"{name}={value!r} is not a whole number", hint=f"choose one of at least {low}", option=name
        )
    if not low <= int(value) <= high:
        limit = f"at least {low}" if int(value) < low else f"at most {high}"
        raise OptionError(
            f"{name}={value} is out of range", hint=f"choose a whole number of {limit}", option=name
        )


def check_number(name: str, value: object, low: float, high: float, *, is_low_open: bool = False) -> None:
    """Raise OptionError unless low <= value <= high (low < value with `is_low_open`); NaN is never in
    range."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(
            f"{name}={value!r} is not a number", hint=f"choose one of {low:g} to {high:g}", option=name
        )
    number = float(value)
    if not low <= number <= high or (is_low_open and number == low):
        least = f"above {low:g}" if is_low_open else f"of at least {low:g}"
        raise OptionError(
            f"{name}={value} is out of range",
            hint=f"choose a number {least} and at most {high:g}",
            option=name,
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise OptionError unless `value` is one of `choices`."""
    if value not in choices:
        raise OptionError(
            f"{name}={value!r} is unknown", hint=f"choose one of {', '.join(choices)}", option=name
        )


def check_kind(name: str, value: object, kind: type | tuple[type, ...], description: str) -> None:
    """Raise OptionError unless `value` is of the kind that `description` tells."""
    if not isinstance(value, kind):
        raise OptionError(f"{name}={value!r} is not {description}", hint=f"choose {description}", option=name)
