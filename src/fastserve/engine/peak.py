"""Whether residents will have room for what they are expected to grow to: admission by predicted peak.

After Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees" (ASPLOS 2025, arXiv
2507.10150).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from fastserve.engine.length import next_mark
from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.residency import Residency
from fastserve.engine.sequence import Residence, Sequence


class PeakForecast:
    """Expects of every completion that it ends after the `quantile` of the tokens that others of its kind
    went on for from its age. Nothing is expected as long as too few have ended to say.

    Args:
        quantile: 0.5 is the median; the greater, the more memory is left to those that are in.
    """

    def __init__(self, work: ExpectedWork, residency: Residency, *, quantile: float) -> None:
        self._work = work
        self._residency = residency
        self._quantile = quantile
        # By sequence_id: up to which length what is expected holds, and the length in the end.
        self._ends: dict[int, tuple[int, int]] = {}

    def peak_of(self, order: Iterable[Sequence]) -> Peak | None:
        """Of the residents among these sequences. None: too little is known."""
        if not self._work.knows_lengths:
            return None
        peak = Peak(self._residency.pool.block_size)
        residents = (Residence.FAST, Residence.ARRIVING)
        for resident in order:
            if resident.residence not in residents:
                continue
            # Whose reader is behind does not grow, and keeps its blocks until somebody needs them.
            left = 0 if resident.is_held else self._tokens_left(resident)
            peak.add(left, len(resident.block_table), is_lasting=resident.is_held)
        num_owned = self._residency.pool.num_blocks - self._residency.pool.num_free
        peak.num_shared = max(peak.num_added - num_owned, 0)
        return peak

    def expect(self, newcomer: Sequence) -> int:
        """Tokens that a sequence is expected to go on for, by what is known now."""
        age = newcomer.num_completion_tokens
        left = self._work.lengths(newcomer).quantile_left(age, self._quantile)
        return min(round(left), self._work.most_left(newcomer))

    def forget(self, sequence: Sequence) -> None:
        self._ends.pop(sequence.sequence_id, None)

    def _tokens_left(self, sequence: Sequence) -> int:
        """As expected when its age was last at a geometric mark."""
        length = len(sequence.token_ids)
        known = self._ends.get(sequence.sequence_id)
        if known is None or length >= known[0]:
            until = sequence.num_prompt_tokens + next_mark(sequence.num_completion_tokens)
            known = self._ends[sequence.sequence_id] = until, length + self.expect(sequence)
        return max(known[1] - length, 1)


class Peak:
    """The most blocks that sequences will own at once, if all run from now on, a token a step.

    Just before one of them ends, it and all that go on for longer have grown by as many tokens as it had
    left; the others are gone. The peak is at one of these moments.

    >>> peak = Peak(block_size=10)
    >>> peak.add(tokens_left=100, num_blocks=5)
    >>> peak.add(tokens_left=20, num_blocks=8)
    >>> peak.num_blocks
    17
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._growing: list[tuple[int, int]] = []  # tokens left, negative, and blocks: the longest first
        self.num_lasting = 0  # blocks of those that neither grow nor end
        self.num_added = 0  # blocks of all
        self.num_shared = 0  # of these, counted more than once

    def add(self, tokens_left: int, num_blocks: int, *, is_lasting: bool = False) -> None:
        self.num_added += num_blocks
        if is_lasting:
            self.num_lasting += num_blocks
        else:
            insort(self._growing, (-tokens_left, num_blocks))

    @property
    def num_blocks(self) -> int:
        owned = most = 0
        for count, (left, num_blocks) in enumerate(self._growing, 1):
            owned += num_blocks
            most = max(most, owned - count * (left // self._block_size))  # negative: rounded up
        return self.num_lasting + most - self.num_shared

    def num_blocks_with(self, tokens_left: int, num_blocks: int) -> int:
        """The peak, were one more added."""
        entry = -tokens_left, num_blocks
        insort(self._growing, entry)
        blocks = self.num_blocks
        self._growing.remove(entry)
        return blocks
