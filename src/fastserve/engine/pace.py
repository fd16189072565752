"""How many prompt tokens a step takes beside the sequences that decode, so that these go on smoothly."""

from __future__ import annotations

from fastserve.engine.cost import OnlineStepCost, StepWork

SMALLEST_CHUNK_TOKENS = 8  # prompts go on, however tight the target is
_SLOWDOWN = 1.85  # of a step by prompts, as long as few of them wait
_BACKLOG_SHARE = 1 / 50  # a longer step is granted to a long backlog: so much of it
_LONGEST_GAP_SECONDS = 0.2
# Of what a key costs a decode, which the fit mostly sees: rows of a prompt share what they read.
# `fastserve bench fit-cost` has 0.5 against 1.5 microseconds.
_SHARED_READS = 1 / 3


class Pace:
    """Chooses a step's prefill tokens by what a step costs.

    Args:
        cost: of a step; its queries are read, nothing is observed.
        max_tokens: rows of one step.
        target_gap_seconds: how long a step may take while sequences decode, which is the gap between the
            tokens of a stream. None adapts: a step takes 1.85 times what its decodes take alone, and, where
            many prompts wait, a fiftieth of the time that these need, up to 0.2 seconds.
    """

    def __init__(
        self, cost: OnlineStepCost, *, max_tokens: int, target_gap_seconds: float | None = None
    ) -> None:
        self._cost = cost
        self._max_tokens = max_tokens
        self.target_gap_seconds = target_gap_seconds

    def prefill_tokens(self, decodes: StepWork, backlog_tokens: int, *, first_position: int = 0) -> int:
        """Prompt tokens for a step that has these decodes, when so many wait to be computed, the next of them
        at a position of its prompt: the later, the more keys it reads.
        """
        room = self._max_tokens - decodes.decode_tokens
        if decodes.decode_tokens == 0 or backlog_tokens == 0:
            return room
        model = self._cost.model
        alone = model.seconds(decodes)
        target = self.target_gap_seconds
        if target is None:
            backlog_seconds = model.prefill_seconds * backlog_tokens
            target = max(_SLOWDOWN * alone, min(_BACKLOG_SHARE * backlog_seconds, _LONGEST_GAP_SECONDS))
        token_seconds = model.prefill_seconds + _SHARED_READS * model.attended_seconds * first_position
        if token_seconds <= 0:
            return room
        affordable = int((target - alone) / token_seconds)
        return min(max(affordable, SMALLEST_CHUNK_TOKENS), room)
