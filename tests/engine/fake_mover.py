"""A slow tier that takes its time, and a clock whose seconds pass when it is looked at."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from fake_executable import FakeExecutable

from fastserve.engine.mover import Move, MoveResult
from fastserve.types import UInt8Array


@dataclass
class Clock:
    seconds: float = 0.0

    def __call__(self) -> float:
        self.seconds += 0.001
        return self.seconds


@dataclass
class SlowMover:
    """Copies blocks of a FakeExecutable when it is polled, some polls after they were submitted."""

    executable: FakeExecutable
    num_slow_blocks: int
    num_polls: int = 2
    cost: float = 1e-5
    fails: bool = False
    pending: list[tuple[int, Move]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = [self.empty()] * self.num_slow_blocks

    def empty(self) -> UInt8Array:
        return np.zeros(self.executable.block_bytes, np.uint8)

    def submit(self, move: Move) -> None:
        self.pending.append((self.num_polls, move))

    def poll(self) -> list[MoveResult]:
        self.pending = [(polls - 1, move) for polls, move in self.pending]
        done = [move for polls, move in self.pending if polls <= 0]
        self.pending = [(polls, move) for polls, move in self.pending if polls > 0]
        for move in done:
            for block, slow_block in move.pairs if not self.fails else ():
                if move.direction == "out":
                    self.memory[slow_block] = self.empty()
                    self.executable.read_block(block, self.memory[slow_block])
                else:
                    self.executable.write_block(block, self.memory[slow_block])
        return [MoveResult(move, 0.001, "Input/output error" if self.fails else None) for move in done]

    def wait(self, timeout_seconds: float) -> None:
        pass

    def seconds_per_block(self) -> float:
        return self.cost

    def close(self) -> None:
        pass
