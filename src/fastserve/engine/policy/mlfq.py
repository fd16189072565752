"""`mlfq`: the skip-join multi-level feedback queue of FastServe (Wu et al., NSDI 2026, arXiv 2305.05920,
section 4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.engine.cost import OnlineStepCost, StepWork
from fastserve.engine.policy.policy import RankedPolicy
from fastserve.engine.sequence import Sequence

_NUM_LEVELS = 24  # quanta that double from a millisecond reach hours


@dataclass(slots=True)
class Standing:
    """What the queue remembers of a sequence."""

    level: int
    waiting_since: float  # the end of its last turn; before, when it came
    attained_seconds: float = 0.0  # at this level
    is_promoted: bool = False  # it came to the first level by starving


class Mlfq(RankedPolicy):
    """Levels whose quanta grow by a factor, the first level first.

    A sequence joins the first level whose quantum covers its prompt's cost. When it has had its level's
    quantum of service it sinks to the next level that covers a step. Whoever waits longer than the starvation
    limit comes to the first level again.

    Args:
        cost: of a step, for the prompt's cost.
        max_sequences: of a step, B in the estimate of next turns.
        quantum_seconds: of the first level; None is the least step, of a single row.
        growth: of the quantum from level to level.
        starvation_seconds: the limit.
        margin: memory is taken for a sequence that is better by so many levels.
        is_guarded: false is as published, where any better level takes memory at any price.
    """

    name = "mlfq"

    def __init__(
        self,
        cost: OnlineStepCost,
        *,
        max_sequences: int,
        quantum_seconds: float | None = None,
        growth: float = 2.0,
        starvation_seconds: float = 10.0,
        margin: int = 2,
        is_guarded: bool = True,
    ) -> None:
        self._cost = cost
        self._max_sequences = max_sequences
        self._quantum_seconds = quantum_seconds
        self._growth = growth
        self._starvation_seconds = starvation_seconds
        self._margin = margin
        self.is_guarded = is_guarded
        self._num_at_level = [0] * _NUM_LEVELS
        self._quanta: list[float] = []
        self._level_of_step = 0
        self._reckon()
        if not is_guarded:
            self.name = "mlfq-published"

    def enter(self, sequence: Sequence, now: float) -> None:
        cost = self._cost.prefill_seconds_of(sequence.num_uncomputed_tokens, sequence.num_computed_tokens)
        level = self._level_for(max(cost, sequence.attained_seconds + sequence.inherited_seconds))
        sequence.standing = Standing(level, now)
        self._join(sequence, level, now)

    def leave(self, sequence: Sequence) -> None:
        self._num_at_level[sequence.standing.level] -= 1
        super().leave(sequence)

    def serve(self, sequences: Seq[Sequence], seconds: float, now: float) -> None:
        for sequence in sequences:
            standing: Standing = sequence.standing
            standing.waiting_since = now
            standing.attained_seconds += seconds
            # The quantum covers the prompt's cost by itself; beside others it takes longer, and is not cut.
            is_prompt_computed = sequence.num_computed_tokens >= sequence.num_prompt_tokens
            if is_prompt_computed and standing.attained_seconds >= self._quanta[standing.level]:
                standing.is_promoted = False
                self._move(sequence, max(standing.level + 1, self._level_of_step), now)

    def refresh(self, sequences: Seq[Sequence], now: float) -> None:
        self._reckon()
        limit = now - self._starvation_seconds
        for sequence in sequences:
            if sequence.is_held:  # it waits for its reader, not for others
                sequence.standing.waiting_since = now
            elif sequence.standing.waiting_since < limit:
                sequence.standing.waiting_since = now
                sequence.standing.is_promoted = True
                self._move(sequence, 0, now)

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        if self.is_guarded and better.standing.is_promoted:
            return False  # it goes first as soon as there is room; where all starve, all would displace all
        return bool(resident.standing.level - better.standing.level >= self._margin)

    def departures(self, residents: Seq[Sequence], now: float) -> list[Sequence]:
        executed = self._seconds_until_executed()

        def next_turn(sequence: Sequence) -> tuple[float, object]:
            promoted = sequence.standing.waiting_since + self._starvation_seconds - now
            return min(promoted, executed[sequence.standing.level]), sequence.rank

        return sorted(residents, key=next_turn, reverse=True)

    def level_of(self, sequence: Sequence) -> int:
        level: int = sequence.standing.level
        return level

    def _move(self, sequence: Sequence, level: int, now: float) -> None:
        self._num_at_level[sequence.standing.level] -= 1
        self._join(sequence, min(level, _NUM_LEVELS - 1), now)

    def _join(self, sequence: Sequence, level: int, now: float) -> None:
        """Last in the queue of a level."""
        sequence.standing.level = level
        sequence.standing.attained_seconds = 0.0
        self._num_at_level[level] += 1
        sequence.rank = (level, now, sequence.sequence_id)

    def _level_for(self, seconds: float) -> int:
        """The first level whose quantum covers so much service."""
        return min(bisect_left(self._quanta, seconds), _NUM_LEVELS - 1)

    def _reckon(self) -> None:
        """Quanta by what a step costs now."""
        least_step = self._cost.seconds(StepWork(decode_tokens=1))
        first = self._quantum_seconds or least_step
        self._quanta = [first * self._growth**level for level in range(_NUM_LEVELS)]
        self._level_of_step = self._level_for(least_step)

    def _seconds_until_executed(self) -> list[float]:
        """By level: until all that are above will have sunk to it, B at a time (the published estimate)."""
        seconds = []
        work = above = 0.0
        for level, num in enumerate(self._num_at_level):
            seconds.append(work / self._max_sequences)
            above += num
            work += above * self._quanta[level]
        return seconds
