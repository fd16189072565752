"""`priority`: classes named by the caller, each first come, first served."""

from __future__ import annotations

from fastserve.engine.policy.policy import RankedPolicy
from fastserve.engine.sequence import Sequence


class Priority(RankedPolicy):
    """Lower `priority` first.

    Args:
        margin: a sequence takes the memory of another whose priority is worse by at least so much.
    """

    name = "priority"

    def __init__(self, *, margin: int = 1) -> None:
        self._margin = margin

    def enter(self, sequence: Sequence, now: float) -> None:
        sequence.rank = (sequence.priority, sequence.arrival_seconds, sequence.sequence_id)

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        return resident.priority - better.priority >= self._margin
