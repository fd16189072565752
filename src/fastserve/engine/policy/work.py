"""What sequences are expected to cost: what is left of the prompt, which is known, and of the completion,
which is not, at the prices of the steps that ran."""

from __future__ import annotations

import logging
from typing import Protocol

from fastserve.engine.cost import OnlineStepCost
from fastserve.engine.length import Kind, LengthDistribution, OutputLengths
from fastserve.engine.sequence import Sequence

logger = logging.getLogger(__name__)


class LengthPredictor(Protocol):
    """Tells requests apart whose completions differ in length. Only which of them are told apart counts: how
    long they are is learned, so that a predictor that knows nothing costs little."""

    def kind(self, sequence: Sequence) -> str:
        """Of a sequence that has come. Asked once of each, in the thread that runs the steps, which wait."""
        ...


class ExpectedWork:
    """Seconds of machine time that sequences are expected to need yet. The scheduler has one, whatever the
    policy, and tells it who comes and goes: what is learned of lengths outlives a change of policy.

    Args:
        cost: of a step. A decoded token costs its row, and its share of what a step costs anyway.
        predictor: None: requests of one tenant at one endpoint are alike.
    """

    def __init__(self, cost: OnlineStepCost, *, predictor: LengthPredictor | None = None) -> None:
        self.cost = cost
        self._predictor = predictor
        self._lengths = OutputLengths()
        self._kinds: dict[int, Kind] = {}  # by sequence_id

    def enter(self, sequence: Sequence) -> None:
        """It has come, before its policy is told."""
        self._kinds[sequence.sequence_id] = self._kind_of(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It is gone, after its policy was told; where it is complete, learn how long it has become."""
        kind = self._kinds.pop(sequence.sequence_id)
        if sequence.is_complete:
            self._lengths.observe(kind, sequence.num_completion_tokens)

    @property
    def is_known(self) -> bool:
        """Whether enough steps have run, and enough completions have ended, that it is more than a guess."""
        return self.cost.is_fitted and self.knows_lengths

    @property
    def knows_lengths(self) -> bool:
        """Whether enough completions have ended that what is expected of others is more than a guess."""
        return self._lengths.is_known

    def lengths(self, sequence: Sequence) -> LengthDistribution:
        return self._lengths.of(self._kinds[sequence.sequence_id])

    @property
    def all_lengths(self) -> LengthDistribution:
        """Of all kinds together."""
        return self._lengths.of_all()

    def prefill_seconds(self, sequence: Sequence) -> float:
        """Of what its prompt, or what was computed of it before it lost its memory, needs yet."""
        start = max(sequence.num_computed_tokens, sequence.num_cached_tokens)
        return self.cost.prefill_seconds_of(max(len(sequence.token_ids) - start - 1, 0), start)

    def most_left(self, sequence: Sequence) -> int:
        """Tokens that its completion may have yet."""
        return sequence.max_tokens - sequence.num_completion_tokens

    def token_seconds(self, sequence: Sequence) -> float:
        """Of each token that it decodes."""
        return self.cost.decode_share_seconds(len(sequence.token_ids))

    def inherited_seconds(self, sequence: Sequence) -> float:
        """What its session has had before it came, which counts as work of its own: the tenth call of a
        program is not a newcomer (Luo et al., "Autellix", arXiv 2502.13965)."""
        return self.cost.share_seconds(sequence.inherited_seconds) if sequence.inherited_seconds else 0.0

    def seconds(self, sequence: Sequence) -> float:
        """All that it needs yet, on average."""
        tokens = self.lengths(sequence).mean_left(sequence.num_completion_tokens)
        tokens = min(tokens, self.most_left(sequence))
        return self.prefill_seconds(sequence) + self.token_seconds(sequence) * tokens

    def _kind_of(self, sequence: Sequence) -> Kind:
        tenant, endpoint = sequence.tenant, sequence.endpoint
        if self._predictor is not None:
            try:
                return tenant, endpoint, str(self._predictor.kind(sequence))
            except Exception:  # it is the caller's; requests go on without it
                logger.exception("the length predictor failed on request %d", sequence.sequence_id)
        return (tenant, endpoint) if endpoint else (tenant,)
