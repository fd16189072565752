"""How long a stream may be paused in all: whoever has waited for others for so long is not paused again."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.engine.clock import Interval
from fastserve.engine.sequence import Sequence

_CHECK_SECONDS = 0.05  # between two looks


class PauseBudget:
    """Finds the streams that have been paused for as long as may be, over their whole life.

    A stream is paused from the end of the step that gave it a token to the beginning of the one that gives it
    its next, where there were steps between without a token for it; not while its reader is behind. The beams
    of a search are one stream (`fastserve.engine.beams`). From when the budget is spent it is *insistent*,
    and goes first to its end. It is paused further only where all that a step can take are insistent too, and
    came before it.

    Args:
        seconds: None is no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._step_seconds = 0.0  # when the last step had run
        self._checks = Interval(_CHECK_SECONDS)
        self.has_any = False  # insistent ones, of those looked at last

    def give(self, streams: Iterable[Sequence], seconds: float, now: float) -> None:
        """A step that took so long has run, and these get a token now."""
        before = self._step_seconds
        for sequence in streams:
            last = sequence.last_token_seconds
            if last is not None and last < before:  # it had none in the step before
                sequence.paused_seconds += max(now - seconds - last, 0.0)
            sequence.last_token_seconds = now
        self._step_seconds = now

    def refresh(self, sequences: Iterable[Sequence], now: float) -> None:
        """Look at all sequences, if it is time to."""
        if self._seconds is None or not self._checks.is_over(now):
            return
        self.has_any = False
        before = self._step_seconds
        for sequence in sequences:
            last = sequence.last_token_seconds
            if last is not None and last < before and not (sequence.is_insistent or sequence.is_held):
                sequence.is_insistent = sequence.paused_seconds + now - last >= self._seconds
            self.has_any |= sequence.is_insistent
