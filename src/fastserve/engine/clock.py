"""The engine's time: seconds that never run backwards, whatever the clock does."""

from __future__ import annotations

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
