"""The engine's time: seconds that never run backwards, whatever the clock does; and what is done now and
then."""

from __future__ import annotations

import math
from collections.abc import Callable


class SteadyClock:
    """A clock of which jumps back do not show: time goes on from where it was. Orders of arrival, waits and
    deadlines hold across them.

    >>> times = iter([5.0, 6.0, 2.0, 3.5])
    >>> clock = SteadyClock(lambda: next(times))
    >>> [clock() for _ in range(4)]
    [5.0, 6.0, 6.0, 7.5]
    >>> clock.of(3.0)
    7.0

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._offset = 0.0  # what all jumps back come to
        self._last: float | None = None

    def __call__(self) -> float:
        now = self._clock() + self._offset
        if self._last is not None and now < self._last:
            self._offset += self._last - now
            now = self._last
        self._last = now
        return now

    def of(self, seconds: float) -> float:
        """What somebody else has read off the same clock lately, as a time of this one."""
        return seconds + self._offset


class Interval:
    """Between two times that something is done, at the least; after a jump back of the clock it is done at
    once.

    >>> looks = Interval(0.1)
    >>> [looks.is_over(now) for now in (7.0, 7.05, 7.125, 3.0)]
    [True, False, True, True]
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = -math.inf

    def is_over(self, now: float) -> bool:
        """Whether it is to be done now; the next interval begins then."""
        if self._next - self._seconds <= now < self._next:
            return False
        self._next = now + self._seconds
        return True
