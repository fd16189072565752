"""Moves of KV blocks between the fast pool and the slow tier. (Landing with the tiers.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Move:
    """One sequence's blocks on their way: pairs of a block of the fast pool and a block of the slow tier."""

    sequence_id: int
    direction: Literal["out", "in"]
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MoveResult:
    move: Move
    seconds: float
    error: str | None


class Mover(Protocol):
    @property
    def num_slow_blocks(self) -> int: ...

    def submit(self, move: Move) -> None: ...

    def poll(self) -> list[MoveResult]: ...

    def wait(self, timeout_seconds: float) -> None: ...

    def seconds_per_block(self) -> float: ...

    def close(self) -> None: ...
