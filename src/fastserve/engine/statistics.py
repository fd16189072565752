"""What an engine's steps were like, counted as they end: cheap enough for each of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Histogram:
    """Counts of values, by the first bound that is not below them.

    >>> histogram = Histogram((1, 2))
    >>> for value in (0.5, 2, 3):
    ...     histogram.observe(value)
    >>> histogram.counts, histogram.total
    ([1, 1, 1], 5.5)
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Seq[float], counts: Seq[int] | None = None, total: float = 0.0) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1) if counts is None else list(counts)
        self.total = total

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        return Histogram(self.bounds, self.counts, self.total)


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """Of all steps so far that ran. Their phases: to schedule (who has a turn), to run (build the batch, the
    backend, the sampler), to emit (commit, text, chunks)."""

    num_sequences: Histogram
    num_tokens: Histogram
    schedule_seconds: Histogram
    run_seconds: Histogram
    emit_seconds: Histogram

    @classmethod
    def empty(cls) -> StepStatistics:
        return cls(Histogram(_SEQUENCES), Histogram(_TOKENS), *(Histogram(_SECONDS) for _ in range(3)))

    def observe(
        self,
        *,
        num_sequences: int,
        num_tokens: int,
        schedule_seconds: float,
        run_seconds: float,
        emit_seconds: float,
    ) -> None:
        """A step has ended."""
        self.num_sequences.observe(num_sequences)
        self.num_tokens.observe(num_tokens)
        self.schedule_seconds.observe(schedule_seconds)
        self.run_seconds.observe(run_seconds)
        self.emit_seconds.observe(emit_seconds)

    def copy(self) -> StepStatistics:
        return StepStatistics(
            self.num_sequences.copy(),
            self.num_tokens.copy(),
            self.schedule_seconds.copy(),
            self.run_seconds.copy(),
            self.emit_seconds.copy(),
        )
