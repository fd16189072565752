"""The sequences of a beam search: each beam is one, and takes its turns as any other.

A beam whose next token is to be chosen waits (it is held) until all beams have come so far; then some go on,
some are taken over by branches of others, which share their blocks, and the rest are given up. So it does not
matter in how many steps the beams get their turns, or which of them are evicted meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from fastserve.checkpoint.generation import TargetRules
from fastserve.engine.beam_search import BeamSearch, Branch, Hypothesis
from fastserve.engine.completion import TokenLogprobs
from fastserve.engine.sequence import Residence, Sequence


@dataclass(frozen=True, slots=True)
class BeamChange:
    """What becomes of the beams when all have come to their next token.

    Attributes:
        new: (parent, child): branches, which are to be taken into the scheduler before the lost are given up.
        lost: beams that nobody goes on from.
        is_over: the search has ended; nothing else has changed then.
    """

    new: Seq[tuple[Sequence, Sequence]] = ()
    lost: Seq[Sequence] = ()
    is_over: bool = False


@dataclass(slots=True)
class Beams:
    """Of one request.

    Args:
        search: decides.
        sequences: the running beams, best first.
    """

    search: BeamSearch
    sequences: list[Sequence]
    is_held: bool = False  # their reader is behind
    service_seconds: float = 0.0  # of beams that were lost
    _candidates: dict[int, list[tuple[int, float]]] = field(default_factory=dict)  # by sequence_id

    def hold(self, now: float, *, is_held: bool) -> None:
        """Their reader is behind, or has caught up: it is no pause."""
        self.is_held = is_held
        for sequence in self.sequences:
            sequence.hold(now, is_held=is_held or sequence.sequence_id in self._candidates)

    def take(
        self, sequence: Sequence, logprobs: TokenLogprobs, next_id: Callable[[], int], now: float
    ) -> BeamChange | None:
        """A beam's likeliest next tokens are known, now; None where others are still to come."""
        self._candidates[sequence.sequence_id] = _candidates_of(sequence, logprobs)
        sequence.is_held = True
        self._share_pauses(sequence, now)
        if len(self._candidates) < len(self.sequences):
            return None
        branches = self.search.advance([self._candidates[beam.sequence_id] for beam in self.sequences])
        self._candidates = {}
        return self._branch(branches, next_id) if branches else BeamChange(is_over=True)

    def total_service_seconds(self) -> float:
        return self.service_seconds + sum(beam.service_seconds for beam in self.sequences)

    def completed(self, hypothesis: Hypothesis, *, seed: int) -> Sequence:
        """A sequence that stands for a text of the search: no scheduler has it."""
        beam = self.sequences[0]
        tokens = [*beam.token_ids[: beam.num_prompt_tokens], *hypothesis.token_ids]
        share = self.total_service_seconds() / beam.params.n
        return replace(beam, token_ids=tokens, seed=seed, service_seconds=share)

    def _share_pauses(self, sequence: Sequence, now: float) -> None:
        """A search is one stream, whose tokens are those of its beams: one that waits for the others is not
        paused, and where one was, all were."""
        is_insistent = any(beam.is_insistent for beam in self.sequences)
        for beam in self.sequences:
            beam.paused_seconds = sequence.paused_seconds
            beam.is_insistent, beam.last_token_seconds = is_insistent, now

    def _branch(self, branches: Seq[Branch], next_id: Callable[[], int]) -> BeamChange:
        tokens_of: dict[int, list[int]] = defaultdict(list)
        for branch in branches:
            tokens_of[branch.parent].append(branch.token_id)
        lost = [beam for index, beam in enumerate(self.sequences) if index not in tokens_of]
        self.service_seconds += sum(beam.service_seconds for beam in lost)
        own: dict[tuple[int, int], Sequence] = {}  # by the branch
        new = []
        for index, tokens in tokens_of.items():
            parent = self.sequences[index]
            for token_id in tokens[1:]:
                child = _child_of(parent, next_id())
                new.append((parent, child))
                own[index, token_id] = child
            own[index, tokens[0]] = parent
        self.sequences = [own[branch] for branch in branches]
        for branch, beam in zip(branches, self.sequences, strict=True):
            beam.token_ids.append(branch.token_id)
            beam.is_held = self.is_held
        return BeamChange(new, lost)


def _candidates_of(sequence: Sequence, logprobs: TokenLogprobs) -> list[tuple[int, float]]:
    """What may follow a beam, by the model's rules: a token that is forced is certain."""
    rules = sequence.target_rules or _NO_RULES
    forced = rules.forced(sequence.num_completion_tokens, sequence.max_tokens)
    if forced is not None:
        return [(forced, 0.0)]
    banned = rules.banned(sequence.token_ids[sequence.target_start :])
    return [(id_, logprob) for id_, logprob in logprobs.top if id_ not in banned]


def _child_of(parent: Sequence, sequence_id: int) -> Sequence:
    """A sequence of the same tokens, which has nothing computed."""
    return replace(
        parent,
        sequence_id=sequence_id,
        token_ids=list(parent.token_ids),
        residence=Residence.NOWHERE,
        num_computed_tokens=0,
        block_table=[],
        slow_blocks=[],
        prefix_keys=[],
        num_registered=0,
        must_drop=False,
        forks=[],
        rank=0,
        standing=None,
        num_charged_tokens=len(parent.token_ids),
        service_seconds=0.0,
        resident_seconds=0.0,
    )


_NO_RULES = TargetRules(start_token_id=0)
