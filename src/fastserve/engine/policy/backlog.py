"""The work of those that have not begun, and what somebody who comes now would have to wait for it."""

from __future__ import annotations

import math

_MEMORY_SECONDS = 120.0  # of the rate at which work is begun
_PRIOR_SECONDS = 10.0  # for which that rate is taken as what costs say
_PEAK_SECONDS = 1500.0  # after which a peak counts for a third
_STEADINESS_SECONDS = 300.0  # over which a backlog counts as steady or not


class Backlog:
    """How long whoever comes now would wait, were all served in the order in which they came.

    That is the work that has not been begun, whoever has it, by the rate at which work is begun while
    somebody waits: it does not depend on the order in which requests are served in fact, and neither on
    clocks.

    >>> backlog = Backlog()
    >>> backlog.add(3.0)
    >>> backlog.wait_seconds
    3.0
    """

    def __init__(self) -> None:
        self._num_waiting = 0
        self._work_seconds = 0.0
        self._begun_seconds = self._busy_seconds = _PRIOR_SECONDS  # of late, while somebody waited
        self.steadiness = 0.0  # mean of the wait over the longest of late, while somebody waits: 0 to 1
        self._peak = 0.0  # as of the time below
        self._peak_seconds = -math.inf

    def add(self, work_seconds: float) -> None:
        """Somebody has come."""
        self._num_waiting += 1
        self._work_seconds += work_seconds

    def begin(self, work_seconds: float) -> None:
        """Somebody has the first turn."""
        self._begun_seconds += work_seconds
        self.remove(work_seconds)

    def remove(self, work_seconds: float) -> None:
        """Somebody is gone without a turn."""
        self._num_waiting -= 1
        self._work_seconds = max(self._work_seconds - work_seconds, 0.0) if self._num_waiting else 0.0

    def pass_time(self, step_seconds: float) -> None:
        """A step has run; those that had their first turn in it are told of after this."""
        if self._num_waiting:
            kept = math.exp(-step_seconds / _MEMORY_SECONDS)
            self._begun_seconds *= kept
            self._busy_seconds = kept * self._busy_seconds + step_seconds
            share = min(self.wait_seconds / self._peak, 1.0) if self._peak else 0.0
            weight = -math.expm1(-step_seconds / _STEADINESS_SECONDS)
            self.steadiness += weight * (share - self.steadiness)

    @property
    def seconds_per_work(self) -> float:
        """How long a second of work, as it is reckoned, takes to be begun."""
        return self._busy_seconds / max(self._begun_seconds, 1e-9)

    @property
    def wait_seconds(self) -> float:
        return self._work_seconds * self.seconds_per_work

    def peak_seconds(self, now: float) -> float:
        """The longest such wait of late; an older one counts for less."""
        faded = self._peak * math.exp(min(self._peak_seconds - now, 0.0) / _PEAK_SECONDS)
        self._peak, self._peak_seconds = max(faded, self.wait_seconds), now
        return self._peak
