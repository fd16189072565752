"""`sjf`: shortest job first, by the prompt's cost and the output to be expected."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

from fastserve.engine.cost import OnlineStepCost
from fastserve.engine.policy.policy import RankedPolicy
from fastserve.engine.sequence import Sequence

_INITIAL_TOKENS = 128.0  # expected of a tenant's first completions
_MOST_TENANTS = 4096  # the ones that have completed least lately are forgotten
_MEMORY = 0.98  # of the mean over a tenant's completions: the last 50 or so count


class Sjf(RankedPolicy):
    """Least work first: what is left of the prompt, and of as many tokens as completions of the same tenant
    have had on average (at most its own limit). Past that average, a sequence counts as half done.

    Args:
        cost: of a step, by which tokens of the prompt and of the completion are weighed.
        margin: a sequence takes the memory of another that has at least so many times its work left.
    """

    name = "sjf"

    def __init__(self, cost: OnlineStepCost, *, margin: float = 2.0) -> None:
        self._cost = cost
        self._margin = margin
        self._mean_tokens: OrderedDict[str, float] = OrderedDict()  # of completions, by tenant

    def enter(self, sequence: Sequence, now: float) -> None:
        self._rank(sequence)

    def serve(self, sequences: Seq[Sequence], seconds: float, now: float) -> None:
        for sequence in sequences:
            self._rank(sequence)

    def leave(self, sequence: Sequence) -> None:
        if sequence.is_complete:
            mean = self._mean_tokens.get(sequence.tenant, _INITIAL_TOKENS)
            self._mean_tokens[sequence.tenant] = (
                _MEMORY * mean + (1 - _MEMORY) * sequence.num_completion_tokens
            )
            self._mean_tokens.move_to_end(sequence.tenant)
            if len(self._mean_tokens) > _MOST_TENANTS:
                self._mean_tokens.popitem(last=False)
        super().leave(sequence)

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        return bool(self._margin * better.rank[0] < resident.rank[0])

    def _rank(self, sequence: Sequence) -> None:
        model = self._cost.model
        tokens = min(self._mean_tokens.get(sequence.tenant, _INITIAL_TOKENS), sequence.max_tokens)
        produced = sequence.num_completion_tokens
        expected = tokens - produced if 2 * produced < tokens else max(produced, 1)
        expected = min(expected, sequence.max_tokens - produced)
        left = sequence.num_prompt_tokens - min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        work = model.prefill_seconds_of(left) + model.decode_seconds * expected
        sequence.rank = (work, sequence.arrival_seconds, sequence.sequence_id)
