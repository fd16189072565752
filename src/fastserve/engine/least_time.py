"""The least time that a sequence needs yet, by which it is judged whether its deadline can be kept."""

from __future__ import annotations

import math

from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.sequence import Sequence

# Of what the cost model says, which is right within some tenths: who could just make it is not given up.
OPTIMISM = 0.75
_HOPE = 0.05  # chance of ending in time below which there is none


class LeastTime:
    """Optimistic seconds, by the speed of the steps so far. A step that reads the end of a prompt gives the
    first token, each further step one more.

    Args:
        work: what is expected of sequences, and what a step costs.
        chunk_tokens: most tokens of one prompt in one step.
    """

    def __init__(self, work: ExpectedWork, *, chunk_tokens: int) -> None:
        self._work = work
        self._chunk_tokens = chunk_tokens

    @property
    def is_known(self) -> bool:
        """Whether enough steps have run to say."""
        return self._work.cost.is_fitted

    def to_next_token(self, sequence: Sequence) -> float:
        """What is left of its prompt, or of what it has to compute again, alone."""
        start = max(sequence.num_computed_tokens, sequence.num_cached_tokens)
        num_steps = math.ceil((len(sequence.token_ids) - start) / self._chunk_tokens)
        fixed = self._work.cost.model.fixed_seconds
        return OPTIMISM * (num_steps * fixed + self._work.prefill_seconds(sequence))

    def certain(self, sequence: Sequence) -> float:
        """To its end, alone, with as few tokens as it may have: one, unless nothing but its limit ends it."""
        model = self._work.cost.model
        num_tokens = self._work.most_left(sequence) if sequence.has_fixed_length else 1
        step_seconds = model.fixed_seconds + model.decode_seconds
        return self.to_next_token(sequence) + OPTIMISM * max(num_tokens - 1, 0) * step_seconds

    def likely(self, sequence: Sequence) -> float:
        """To its end beside as many as usual, with as few tokens as one in twenty of its kind and age has."""
        num_tokens: float = self._work.most_left(sequence)
        if not sequence.has_fixed_length:
            fewest = 1.0
            if self._work.knows_lengths:
                fewest = self._work.lengths(sequence).quantile_left(sequence.num_completion_tokens, _HOPE)
            num_tokens = min(fewest, num_tokens)
        further = max(num_tokens - 1, 0.0)
        return self.to_next_token(sequence) + OPTIMISM * further * self._work.cost.decode_step_seconds
