"""The highest rate of requests at which something still holds, by doubling or halving, then bisection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastserve.errors import MeasurementError
from fastserve.option import check_number

_LEAST_RATE = 1e-3
_MOST_TRIALS = 24


async def find_rate(
    holds_at: Callable[[float], Awaitable[bool]], *, start: float, precision: float
) -> tuple[float, float]:
    """The highest rate found at which it holds, and the lowest at which it does not.

    Rates are tried from `start` on; the two differ by a factor of at most `1 + precision`. Where a trial is a
    matter of luck, so is the result, within the rates where it is.

    Raises:
        MeasurementError: it holds at no rate, or at every one.
        OptionError: the precision is out of its range.
    """
    check_precision(precision)
    held = missed = None
    rate = start
    for _ in range(_MOST_TRIALS):
        if await holds_at(rate):
            held = rate
        else:
            missed = rate
        if held is not None and missed is not None:
            if missed <= held * (1 + precision):
                return held, missed
            rate = (held * missed) ** 0.5
        elif held is not None:
            rate = held * 2
        else:
            rate /= 2
            if rate < _LEAST_RATE:
                break
    if held is None:
        raise MeasurementError(
            f"the SLO holds at no rate, not even {_LEAST_RATE:g} a second",
            hint="see what fails at a low --rate, or choose a wider --slo",
        )
    raise MeasurementError(
        f"the SLO still holds at {held:g} requests a second", hint="begin at a higher --rate"
    )


def check_precision(precision: float) -> None:
    """Raise OptionError unless the search can end by it: it is above 0 and at most 1."""
    check_number("precision", precision, 0.0, 1.0, is_low_open=True)
