"""`gittins`: the sequence goes first that is expected to complete the most for its cost (Gittins, 1979)."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from fastserve.engine.clock import Interval
from fastserve.engine.length import next_mark
from fastserve.engine.policy.policy import RankedPolicy
from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.sequence import Sequence

_RERANK_SECONDS = 1.0  # between two looks at those that wait


class Gittins(RankedPolicy):
    """Least expected cost for a chance to complete first, over all lengths of service: the inverse of the
    Gittins index, by the lengths of completions that were seen, given how many tokens there are already. Best
    for the mean (Aalto, Ayesta and Righter, Queueing Syst. 63, 2009); whoever is long may wait for long.

    Args:
        work: what is expected of sequences.
        margin: a sequence takes the memory of another whose cost is so many times its own.
    """

    name = "gittins"

    def __init__(self, work: ExpectedWork, *, margin: float = 2.0) -> None:
        self._work = work
        self._margin = margin
        self._reranks = Interval(_RERANK_SECONDS)

    def enter(self, sequence: Sequence, now: float) -> None:
        self._rank(sequence)

    def refresh(self, sequences: Seq[Sequence], now: float) -> None:
        """Those that have not begun, by what has been learned since."""
        if self._reranks.is_over(now):
            for sequence in sequences:
                if not sequence.is_started:
                    self._rank(sequence)

    def serve(self, sequences: Seq[Sequence], seconds: float, now: float) -> None:
        for sequence in sequences:
            if not sequence.num_completion_tokens or sequence.num_completion_tokens >= sequence.standing:
                self._rank(sequence)

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        return bool(self._margin * better.rank[0] < resident.rank[0])

    def _rank(self, sequence: Sequence) -> None:
        work = self._work
        produced = sequence.num_completion_tokens
        known = work.prefill_seconds(sequence) + work.inherited_seconds(sequence)
        price = work.token_seconds(sequence)
        ratio = work.lengths(sequence).least_ratio(produced, known, price)
        ratio = min(ratio, known + price * work.most_left(sequence))  # by then the end is certain
        sequence.rank = (ratio, sequence.arrival_seconds, sequence.sequence_id)
        sequence.standing = next_mark(produced)
