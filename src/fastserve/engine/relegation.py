"""Who can no longer be in time, and therefore goes behind those that still can: what is late already does not
make others late.

After Niyama, also QoServe (Goel et al., ASPLOS 2026, arXiv 2503.22562), and section 6 of the report that the
policies follow from: an overload is borne by few instead of spoiling everybody's deadline.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.engine.clock import Interval
from fastserve.engine.least_time import LeastTime
from fastserve.engine.sequence import Sequence

_CHECK_SECONDS = 0.1  # between two looks


class Relegation:
    """Marks sequences that are not likely to end by their deadline, or whose first token cannot come in time.
    Who is marked may be unmarked, as steps have become faster; the deadline itself ends who has not ended.

    Args:
        least_time: that sequences need yet.
        first_token_seconds: objective of the first token, from the arrival on; None: there is none.
    """

    def __init__(self, least_time: LeastTime, *, first_token_seconds: float | None = None) -> None:
        self._least_time = least_time
        self._first_token_seconds = first_token_seconds
        self._checks = Interval(_CHECK_SECONDS)
        self.has_any = False  # of those looked at last

    def refresh(self, sequences: Iterable[Sequence], now: float) -> None:
        """Look at all sequences, if it is time to."""
        if not self._checks.is_over(now) or not self._least_time.is_known:
            return
        self.has_any = False
        objective = self._first_token_seconds
        for sequence in sequences:
            if sequence.deadline_seconds is not None or objective is not None:
                sequence.is_relegated = self._is_hopeless(sequence, now)
                self.has_any |= sequence.is_relegated

    def _is_hopeless(self, sequence: Sequence, now: float) -> bool:
        least, objective = self._least_time, self._first_token_seconds
        if objective is not None and sequence.num_completion_tokens == 0:
            latest = sequence.arrival_seconds + objective
            if now + least.to_next_token(sequence) > latest:
                return True
        deadline = sequence.deadline_seconds
        return deadline is not None and now + least.likely(sequence) > deadline
