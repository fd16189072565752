"""Who can no longer be in time, and therefore goes behind those that still can: what is late already does not
make others late.

After Niyama, also QoServe (Goel et al., ASPLOS 2026, arXiv 2503.22562), and section 6 of the report that the
policies follow from: an overload is borne by few instead of spoiling everybody's deadline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fastserve.engine.clock import Interval
from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.sequence import Sequence

_CHECK_SECONDS = 0.1  # between two looks
_OPTIMISM = 0.75  # of what is expected, as estimates are: who could just make it is not relegated
_HOPE = 0.05  # chance of ending in time below which there is none


class Relegation:
    """Marks sequences that cannot end by their deadline, or whose first token cannot come in time.

    What is left of a prompt is known; a completion has as many tokens left as one in twenty of its kind has
    at least, or all of `max_tokens` where nothing else can end it, and takes a step for each. Who is marked
    may be unmarked, as steps have become faster; the deadline itself ends whoever has not ended.

    Args:
        first_token_seconds: objective of the first token, from the arrival on; None: there is none.
    """

    def __init__(self, work: ExpectedWork, *, first_token_seconds: float | None = None) -> None:
        self._work = work
        self._first_token_seconds = first_token_seconds
        self._checks = Interval(_CHECK_SECONDS)
        self.has_any = False  # of those looked at last

    def refresh(self, sequences: Iterable[Sequence], now: float) -> None:
        """Look at all sequences, if it is time to."""
        if not self._checks.is_over(now) or not self._work.cost.is_fitted:
            return
        self.has_any = False
        objective = self._first_token_seconds
        for sequence in sequences:
            if sequence.deadline_seconds is not None or objective is not None:
                sequence.is_relegated = self._is_hopeless(sequence, now)
                self.has_any |= sequence.is_relegated

    def _is_hopeless(self, sequence: Sequence, now: float) -> bool:
        prefill = _OPTIMISM * self._work.prefill_seconds(sequence)
        objective = self._first_token_seconds
        latest = math.inf if objective is None else sequence.arrival_seconds + objective
        if sequence.num_completion_tokens == 0 and now + prefill > latest:
            return True
        if sequence.deadline_seconds is None:
            return False
        seconds = prefill + _OPTIMISM * self._fewest_tokens(sequence) * self._work.cost.decode_step_seconds
        return now + seconds > sequence.deadline_seconds

    def _fewest_tokens(self, sequence: Sequence) -> float:
        """That it goes on for, all but certainly; the first one comes with the prompt."""
        most = self._work.most_left(sequence)
        params = sequence.params
        if params.ignore_eos and not params.stop and not params.stop_token_ids:
            fewest: float = most
        elif self._work.knows_lengths:
            age = sequence.num_completion_tokens
            fewest = min(self._work.lengths(sequence).quantile_left(age, _HOPE), most)
        else:
            fewest = 1
        return fewest - (sequence.num_completion_tokens == 0)
