"""`hrrn`: highest response ratio next (Brinch Hansen, 1971), on total work."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from fastserve.engine.clock import Interval
from fastserve.engine.policy.policy import RankedPolicy
from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.sequence import Sequence

_RERANK_SECONDS = 0.02  # between two looks at those that wait: ratios change slowly


class Hrrn(RankedPolicy):
    """Whoever has begun goes on, in order of arrival. Of the others, the one goes first whose time so far and
    expected work, over its expected work, is greatest: short ones overtake, and whoever waits comes up.

    Args:
        work: what is expected of sequences.
    """

    name = "hrrn"

    def __init__(self, work: ExpectedWork) -> None:
        self._work = work
        self._reranks = Interval(_RERANK_SECONDS)

    def enter(self, sequence: Sequence, now: float) -> None:
        work = self._work.seconds(sequence) + self._work.inherited_seconds(sequence)
        sequence.standing = max(work, 1e-9)
        self._rank(sequence, now)

    def serve(self, sequences: Seq[Sequence], seconds: float, now: float) -> None:
        for sequence in sequences:
            if sequence.rank[0]:
                sequence.rank = (0, sequence.arrival_seconds, sequence.sequence_id)

    def refresh(self, sequences: Seq[Sequence], now: float) -> None:
        if self._reranks.is_over(now):
            for sequence in sequences:
                if sequence.rank[0]:
                    self._rank(sequence, now)

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        return False

    def _rank(self, sequence: Sequence, now: float) -> None:
        if sequence.is_started:
            sequence.rank = (0, sequence.arrival_seconds, sequence.sequence_id)
            return
        waited = now - sequence.arrival_seconds
        sequence.rank = (1, -(waited / sequence.standing), sequence.sequence_id)
