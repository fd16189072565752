"""Which requests are taken in, and until when: a bounded queue, deadlines that can be kept, a longest
wait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal

from fastserve.engine.least_time import OPTIMISM, LeastTime
from fastserve.engine.schedule import Scheduler
from fastserve.engine.sequence import Sequence
from fastserve.errors import DeadlineError, QueueFullError
from fastserve.types import Limits

_LONGEST_RETRY_SECONDS = 3600.0

Watch = Literal["start", "queue", "deadline"]
"""What happens at a time: too late to be complete in time, too long without a turn, the time has passed."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A request that may end by the clock."""

    sequence: Sequence  # its first
    timeout_ms: float | None


class Admission:
    """Refuses what cannot be kept, and ends what has taken too long.

    Args:
        max_waiting: most requests without a turn; None is no limit.
        queue_timeout_ms: longest wait for a first turn; None is for ever.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        limits: Limits,
        *,
        max_waiting: int | None = None,
        queue_timeout_ms: float | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._least_time = LeastTime(scheduler.work, chunk_tokens=scheduler.chunk_tokens)
        self._limits = limits
        self._max_waiting = max_waiting
        self._queue_timeout_ms = queue_timeout_ms
        self._watched: dict[int, Watched] = {}  # by request_id
        self._times: list[tuple[float, int, Watch]] = []  # a heap; those of ended requests are passed over
        self.num_refused = 0
        self.num_expired = 0

    def check_queue(self) -> None:
        """
        Raises:
            QueueFullError: as many requests wait as may.
        """
        num_waiting = self._scheduler.num_unstarted
        if self._max_waiting is None or num_waiting < self._max_waiting:
            return
        self.num_refused += 1
        seconds = self._seconds_until_start()
        raise QueueFullError(
            f"{num_waiting} requests wait for their first turn; max_waiting is {self._max_waiting}",
            retry_after_seconds=seconds,
            hint=f"try again in about {seconds:.2g} seconds",
        )

    def check_deadline(self, sequence: Sequence, timeout_ms: float, now: float) -> None:
        """Whether a sequence, which the scheduler has ranked, can be complete in time, optimistically: by
        what is left of the prompts that go before it, its own, and its fewest tokens, at the speed of the
        steps so far.

        Raises:
            DeadlineError: its deadline has passed, or cannot be kept.
        """
        assert sequence.deadline_seconds is not None
        left = sequence.deadline_seconds - now
        if left <= 0:
            self.num_refused += 1
            raise DeadlineError(
                f"timeout_ms={timeout_ms:g} of the request was over {-left:.3g} seconds ago",
                hint="allow more time, or send it again",
            )
        if not self._least_time.is_known:
            return
        own, ahead = self._least_time.certain(sequence), self._seconds_ahead(sequence)
        if own + ahead > left:
            self.num_refused += 1
            raise DeadlineError(
                f"the request cannot be complete within timeout_ms={timeout_ms:g}: {1000 * left:.0f} ms are "
                f"left, itself takes at least {1000 * own:.0f}, what is before it {1000 * ahead:.0f}",
                hint="allow more time, or send it when less is waiting",
            )

    def watch(self, request_id: int, sequence: Sequence, timeout_ms: float | None, now: float) -> None:
        """A request has been taken in: end it in time."""
        if timeout_ms is None and self._queue_timeout_ms is None:
            return
        self._watched[request_id] = Watched(sequence, timeout_ms)
        if self._queue_timeout_ms is not None:
            longest = sequence.arrival_seconds + self._queue_timeout_ms / 1000
            heappush(self._times, (longest, request_id, "queue"))
        if sequence.deadline_seconds is not None:
            heappush(self._times, (sequence.deadline_seconds, request_id, "deadline"))
            if self._least_time.is_known:
                latest = sequence.deadline_seconds - self._least_time.certain(sequence)
                heappush(self._times, (max(latest, now), request_id, "start"))

    def forget(self, request_id: int) -> None:
        """It has ended."""
        if self._watched.pop(request_id, None) is not None and len(self._times) > 4 * len(self._watched) + 64:
            self._times = [time for time in self._times if time[1] in self._watched]
            heapify(self._times)

    def expired(self, now: float) -> list[tuple[int, str]]:
        """The requests whose time is over, by request_id, and why. Each is named once."""
        expired: dict[int, str] = {}
        while self._times and self._times[0][0] <= now:
            _, request_id, watch = heappop(self._times)
            watched = self._watched.get(request_id)
            if watched is not None and (watch == "deadline" or not watched.sequence.is_started):
                expired.setdefault(request_id, self._reason(watched, watch))
        self.num_expired += len(expired)
        return list(expired.items())

    def _reason(self, watched: Watched, watch: Watch) -> str:
        if watch == "queue":
            return f"it had no turn within the queue_timeout_ms of {self._queue_timeout_ms:g}"
        if watch == "deadline":
            return f"its timeout_ms of {watched.timeout_ms:g} has passed"
        return f"it had no turn while it could be complete within its timeout_ms of {watched.timeout_ms:g}"

    def _seconds_ahead(self, sequence: Sequence) -> float:
        """The least that prompts take which go before it: all of them, where a prompt may fill a step; else
        as many chunks as it has itself, beside which its own go on."""
        scheduler = self._scheduler
        most = math.inf
        if scheduler.chunk_tokens < self._limits.max_tokens:
            own = scheduler.residency.num_to_compute(sequence)
            most = math.ceil(own / scheduler.chunk_tokens) * scheduler.chunk_tokens
        num_tokens = 0.0
        for other in scheduler.order():
            if other is sequence:
                break
            if not other.is_held and not other.is_decoding:
                num_tokens += min(scheduler.residency.num_to_compute(other), most)
        model = scheduler.cost.model
        num_steps = num_tokens // self._limits.max_tokens
        return OPTIMISM * (num_steps * model.fixed_seconds + num_tokens * model.prefill_seconds)

    def _seconds_until_start(self) -> float:
        """When one more request will have had its first turn: by how they have started of late; where none
        has, by what the prompts that wait cost."""
        scheduler = self._scheduler
        seconds = scheduler.seconds_per_start
        if math.isinf(seconds):
            waiting = [s for s in scheduler.sequences if not s.is_started]
            costs = sum(scheduler.cost.prefill_seconds_of(s.num_uncomputed_tokens) for s in waiting)
            seconds = scheduler.cost.model.fixed_seconds + costs / max(len(waiting), 1)
        return min(seconds, _LONGEST_RETRY_SECONDS)
