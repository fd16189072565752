"""Whether a sequence may lose its memory to a better one: only at a price that pays, and not again and again.

Every policy shares these guards, which act after the policy's own margin (`outranks`). Without them a
preemptive policy under memory pressure moves more than it computes.
"""

from __future__ import annotations

from fastserve.engine.sequence import Sequence

_WORTH = 4.0  # a stay in the fast pool earns at least so many times what leaving and coming back cost
_SHARE_OF_TIME = 0.1  # evictions may take so much of all time
_MOST_SAVED_SECONDS = 2.0  # of evictions that were not used, kept for bursts


class Guard:
    """Prices and rations evictions that make room for better sequences.

    - *Price*: the sequence has been served, since it came, four times what its eviction costs, so that moves
      take a small part of the time.
    - *Geometric*: by its n-th eviction, a sequence has been served twice as long as at the one before. It is
      evicted a number of times that grows with the logarithm of its length.
    - *Ration*: over all sequences, evictions cost at most a tenth of the time that passes.
    """

    def __init__(self) -> None:
        self._saved_seconds = _MOST_SAVED_SECONDS
        self._last_seconds: float | None = None

    def allows(self, sequence: Sequence, eviction_seconds: float, now: float) -> bool:
        """Whether this sequence may be evicted, where leaving and coming back cost so much."""
        self._earn(now)
        if eviction_seconds > self._saved_seconds:
            return False
        if sequence.resident_seconds < _WORTH * eviction_seconds:
            return False
        before_this_stay = sequence.attained_seconds - sequence.resident_seconds
        return sequence.num_evictions == 0 or sequence.resident_seconds >= before_this_stay

    def spend(self, eviction_seconds: float) -> None:
        """An eviction has been decided."""
        self._saved_seconds -= eviction_seconds

    def _earn(self, now: float) -> None:
        if self._last_seconds is not None:
            earned = _SHARE_OF_TIME * max(0.0, now - self._last_seconds)
            self._saved_seconds = min(self._saved_seconds + earned, _MOST_SAVED_SECONDS)
        self._last_seconds = now
