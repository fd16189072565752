"""Who has to go first, lest somebody waits for longer than anybody has to."""

from __future__ import annotations

from bisect import bisect_left, insort

from fastserve.engine.sequence import Sequence

_HORIZON_SECONDS = 1.0  # of work, that is due together: more than is begun between two looks


class DueQueue:
    """Sequences that have no token yet, each with the time by which it is to begin, the earliest first.

    Anybody may go first as long as all can still begin in time, one after the other in the order of these
    times. As soon as one could not any more, it and those before it are due, and nobody else is to begin.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Sequence]] = []  # by order, sequence_id
        self._orders: dict[int, float] = {}  # by sequence_id
        self._work_seconds: dict[int, float] = {}  # of those that have not begun, by sequence_id

    def add(self, sequence: Sequence, order: float, work_seconds: float | None) -> None:
        """
        Args:
            order: the time by which it is to begin, less what `find` is given as allowed.
            work_seconds: what it has to begin with; None: it has begun.
        """
        sequence_id = sequence.sequence_id
        insort(self._entries, (order, sequence_id, sequence))
        self._orders[sequence_id] = order
        if work_seconds is not None:
            self._work_seconds[sequence_id] = work_seconds

    def order(self, sequence: Sequence) -> float:
        """As it was given with it."""
        return self._orders[sequence.sequence_id]

    def begin(self, sequence: Sequence) -> None:
        """It has had a turn: nobody waits for its work any more."""
        self._work_seconds.pop(sequence.sequence_id, None)

    def remove(self, sequence: Sequence) -> None:
        """It has a token, or is gone."""
        sequence_id = sequence.sequence_id
        del self._entries[bisect_left(self._entries, (self._orders.pop(sequence_id), sequence_id))]
        self._work_seconds.pop(sequence_id, None)

    def find(
        self, now: float, *, allowed_seconds: float, most_seconds: float, seconds_per_work: float
    ) -> dict[int, Sequence]:
        """Those that are due, by sequence_id.

        Where some are late already, these, and as many of the next as are begun at about the same time.

        Args:
            allowed_seconds: from a sequence's order to the time by which it is to begin.
            most_seconds: after its arrival anybody is due, whatever its order.
            seconds_per_work: how long it takes to begin a second of work.
        """
        num_due = 0
        ahead = 0.0
        latest = now - allowed_seconds
        works = self._work_seconds
        for place, (order, sequence_id, sequence) in enumerate(self._entries):
            if not _can_go_first(sequence):
                continue
            ahead += works.get(sequence_id, 0.0) * seconds_per_work
            if ahead <= _HORIZON_SECONDS:
                if order - ahead < latest:
                    num_due = place + 1
            elif num_due:
                break
            elif order - ahead < latest:
                num_due = place + 1
                break
        came_before = now - most_seconds
        return {
            sequence_id: sequence
            for place, (_, sequence_id, sequence) in enumerate(self._entries)
            if (place < num_due or sequence.arrival_seconds < came_before) and _can_go_first(sequence)
        }


def _can_go_first(sequence: Sequence) -> bool:
    """Whether it is not passed over whatever its rank is, and has no token yet."""
    return not (sequence.is_held or sequence.is_relegated or sequence.num_completion_tokens)
