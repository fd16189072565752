"""Moves of KV blocks under a fake clock, one at a time, or one at a time in each direction."""

from __future__ import annotations

from collections import deque

from fastserve.engine.mover import Move, MoveResult


class SimulatedClock:
    """What time it is in a simulation, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0


class SimulatedMover:
    """A Mover whose moves are done when the clock says so, first in, first out.

    Args:
        is_duplex: moves out and moves in do not wait for each other.

    >>> clock = SimulatedClock()
    >>> mover = SimulatedMover(clock, num_slow_blocks=8, seconds_per_block=0.5)
    >>> mover.submit(Move(0, "out", ((3, 0), (4, 1))))
    >>> mover.poll(), mover.next_seconds
    ([], 1.0)
    >>> clock.seconds = 1.0
    >>> [result.move.sequence_id for result in mover.poll()]
    [0]
    """

    def __init__(
        self, clock: SimulatedClock, *, num_slow_blocks: int, seconds_per_block: float, is_duplex: bool = True
    ) -> None:
        self._clock = clock
        self._num_slow_blocks = num_slow_blocks
        self._seconds_per_block = seconds_per_block
        # Moves with the times when they are done and how long each takes.
        out: deque[tuple[float, float, Move]] = deque()
        self._channels = {"out": out, "in": deque() if is_duplex else out}

    @property
    def num_slow_blocks(self) -> int:
        return self._num_slow_blocks

    @property
    def next_seconds(self) -> float | None:
        """When the next move will be done; None: there is none."""
        return min((channel[0][0] for channel in self._channels.values() if channel), default=None)

    def submit(self, move: Move) -> None:
        channel = self._channels[move.direction]
        start = max(self._clock.seconds, channel[-1][0] if channel else 0.0)
        seconds = len(move.pairs) * self._seconds_per_block
        channel.append((start + seconds, seconds, move))

    def poll(self) -> list[MoveResult]:
        done = []
        for channel in self._channels.values():
            while channel and channel[0][0] <= self._clock.seconds:
                _, seconds, move = channel.popleft()
                done.append(MoveResult(move, seconds, None))
        return done

    def wait(self, timeout_seconds: float) -> None:
        """Let the time pass until a move is done, or the timeout is over."""
        end = self._clock.seconds + timeout_seconds
        self._clock.seconds = (
            end if self.next_seconds is None else max(self._clock.seconds, min(end, self.next_seconds))
        )

    def seconds_per_block(self) -> float:
        return self._seconds_per_block

    def close(self) -> None:
        pass
