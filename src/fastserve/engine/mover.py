"""Moving KV blocks between the fast pool and a slow tier, beside the steps.

Callers and the I/O thread exchange values only: a move goes in, a result comes out, in the same order.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from statistics import median
from threading import Condition, Thread
from typing import Literal, Protocol

import numpy as np

from fastserve.config import EngineOptions
from fastserve.engine.tier import HostTier, SlowTier, SpillFile
from fastserve.errors import MemoryLimitError, OptionError
from fastserve.types import Executable, UInt8Array

# Of the newest move in the mean of seconds a block, as TCP smooths round-trip times (RFC 6298, section 2).
_SMOOTHING = 1 / 8
_NUM_PROBES = 3  # of the tier, before anything has moved
_CLOSE_SECONDS = 10.0  # a disk that hangs for longer keeps its thread, but nobody waits for it

logger = logging.getLogger(__name__)

Direction = Literal["out", "in"]


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks of one sequence that go `out` to the slow tier or come `in` from it.

    Until its result is there, nobody else may use the slow blocks, write to blocks that go out, or name
    blocks that come in.
    """

    sequence_id: int
    direction: Direction
    pairs: tuple[tuple[int, int], ...]  # (block of the fast pool, block of the slow tier)


@dataclass(frozen=True, slots=True)
class MoveResult:
    """A move that is over. With an `error`, one line, whatever it should have filled holds anything: blocks
    of the slow tier after a move out, of the fast pool after a move in; what it read is as it was."""

    move: Move
    seconds: float  # on the I/O thread, without the time before its turn
    error: str | None


class Mover(Protocol):
    """Moves blocks one move after the other, in the order of `submit`. One thread at a time calls it."""

    @property
    def num_slow_blocks(self) -> int: ...

    def submit(self, move: Move) -> None:
        """Queue a move; never waits for one."""
        ...

    def poll(self) -> list[MoveResult]:
        """What has finished since the last poll, in order; never waits."""
        ...

    def wait(self, timeout_seconds: float) -> None:
        """Until a result can be polled or the time is over; at once where no move is on its way."""
        ...

    def seconds_per_block(self) -> float:
        """Of a move, in either direction: a mean that forgets, measured from the beginning."""
        ...

    def close(self) -> None:
        """Stop, and close the tier. Moves that are not over end with an error, which can still be polled.
        Closing again does nothing."""
        ...


class ThreadMover:
    """Implements `Mover` with one I/O thread, which owns the tier. Close it: the thread keeps it alive.

    Raises:
        OptionError: the tier does not work.
    """

    def __init__(self, executable: Executable, tier: SlowTier) -> None:
        assert tier.num_blocks > 0, "there is nothing to move to"
        self.num_slow_blocks = tier.num_blocks
        self._executable = executable
        self._tier = tier
        self._buffer: UInt8Array = np.empty(executable.block_bytes, np.uint8)
        self._seconds_per_block = self._probe()
        self._changed = Condition()  # guards what follows
        self._queued: deque[Move] = deque()
        self._results: list[MoveResult] = []
        self._is_moving = False
        self._is_closing = False
        self._thread = Thread(target=self._run, name="fastserve-mover", daemon=True)
        self._thread.start()

    def submit(self, move: Move) -> None:
        with self._changed:
            assert not self._is_closing, "the mover is closed"
            self._queued.append(move)
            self._changed.notify_all()

    def poll(self) -> list[MoveResult]:
        with self._changed:
            results, self._results = self._results, []
            return results

    def wait(self, timeout_seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._results or not self._is_busy, timeout_seconds)

    def seconds_per_block(self) -> float:
        return self._seconds_per_block

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("the disk of kv_spill has not answered for %.0f seconds", _CLOSE_SECONDS)

    @property
    def _is_busy(self) -> bool:
        return self._is_moving or bool(self._queued)

    def _probe(self) -> float:
        """Seconds that a block takes one way. Block 0 goes out and comes back as it was; nothing runs yet."""
        seconds = []
        try:
            for _ in range(_NUM_PROBES):
                begin = time.perf_counter()
                self._transfer("out", 0, 0)
                self._transfer("in", 0, 0)
                seconds.append((time.perf_counter() - begin) / 2)
        except OSError as error:
            self._tier.close()
            raise OptionError(
                f"the memory of kv_spill does not work: {error.strerror or error}",
                hint="name a folder on another disk with spill_dir, or leave kv_spill out",
            ) from error
        return median(seconds)

    def _run(self) -> None:
        try:
            while (move := self._next()) is not None:
                self._finish(self._move(move))
        finally:
            self._tier.close()

    def _next(self) -> Move | None:
        """The next move, as soon as there is one; None when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._queued or self._is_closing)
            if self._is_closing:
                self._results += [MoveResult(move, 0.0, "the mover was closed") for move in self._queued]
                self._queued.clear()
                return None
            self._is_moving = True
            return self._queued.popleft()

    def _finish(self, result: MoveResult) -> None:
        if result.error is None and result.move.pairs:
            seconds = result.seconds / len(result.move.pairs)
            self._seconds_per_block += _SMOOTHING * (seconds - self._seconds_per_block)
        with self._changed:
            self._is_moving = False
            self._results.append(result)
            self._changed.notify_all()

    def _move(self, move: Move) -> MoveResult:
        begin = time.perf_counter()
        error = None
        for block, slow_block in move.pairs:
            if (error := self._try_transfer(move.direction, block, slow_block)) is not None:
                break
        return MoveResult(move, time.perf_counter() - begin, error)

    def _try_transfer(self, direction: Direction, block: int, slow_block: int) -> str | None:
        """The reason why a block could not be moved, in one line."""
        if self._is_closing:
            return "the mover was closed"
        try:
            self._transfer(direction, block, slow_block)
        except OSError as error:
            return f"block {block} could not be moved {direction}: {error.strerror or error}"
        except Exception as error:  # a defect of ours; the thread goes on, as other sequences need it
            logger.exception("block %d, slow block %d: moving %s failed", block, slow_block, direction)
            return f"block {block} could not be moved {direction}: {type(error).__name__}: {error}"
        return None

    def _transfer(self, direction: Direction, block: int, slow_block: int) -> None:
        if direction == "out":
            self._executable.read_block(block, self._buffer)
            self._tier.write(slow_block, self._buffer)
        else:
            self._tier.read(slow_block, self._buffer)
            self._executable.write_block(block, self._buffer)


def make_mover(executable: Executable, options: EngineOptions) -> ThreadMover | None:
    """A mover to a tier of as many whole blocks as `kv_spill` holds; None where that is off.

    The tier is a file in `spill_dir` where the KV pool lies in this machine's memory, else host memory.

    Raises:
        OptionError: `spill_dir` cannot be used.
        MemoryLimitError: `kv_spill` does not hold a block, or there is not so much space.
    """
    if not options.kv_spill_bytes:
        return None
    num_blocks = options.kv_spill_bytes // executable.block_bytes
    if num_blocks == 0:
        raise MemoryLimitError(
            f"kv_spill={options.kv_spill_bytes} is less than a block of {executable.block_size} tokens",
            hint=f"choose kv_spill={executable.block_bytes} or more, or leave it out",
        )
    return ThreadMover(executable, _make_tier(executable, num_blocks, options))


def _make_tier(executable: Executable, num_blocks: int, options: EngineOptions) -> SlowTier:
    if executable.is_pool_on_host:
        return SpillFile(num_blocks=num_blocks, block_bytes=executable.block_bytes, folder=options.spill_dir)
    return HostTier(num_blocks=num_blocks, block_bytes=executable.block_bytes)
