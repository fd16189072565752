"""`fcfs`: first come, first served."""

from __future__ import annotations

from fastserve.engine.policy.policy import RankedPolicy
from fastserve.engine.sequence import Sequence


class Fcfs(RankedPolicy):
    """In order of arrival. Nobody's memory is taken for somebody better; under pressure the last one
    yields."""

    name = "fcfs"

    def enter(self, sequence: Sequence, now: float) -> None:
        sequence.rank = (sequence.arrival_seconds, sequence.sequence_id)

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        return False
