"""Beam search over the tokens of one completion: which beams go on, which have ended, when it is over.

As `transformers` has it (GenerationMixin._beam_search of version 5): of every beam's likeliest tokens the
best are taken, twice as many as beams; those of the first half that end a text are kept aside, with their sum
of log-probabilities divided by their length to the power of the length penalty; the best others go on.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastserve.types import MAX_TOP_LOGPROBS, EarlyStopping


class Branch(NamedTuple):
    """A beam of the next step: the beam that it goes on from, and its newest token."""

    parent: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text that has ended."""

    score: float
    token_ids: tuple[int, ...]


class BeamSearch:
    """
    >>> search = BeamSearch(1, eos_token_ids={0}, max_tokens=2)
    >>> search.advance([[(5, -0.1), (0, -2.0)]])
    [Branch(parent=0, token_id=5)]
    >>> search.advance([[(0, -0.5), (7, -1.0)]]), search.best(1)[0].token_ids
    ([], (5, 0))

    Args:
        eos_token_ids: that end a text.
        max_tokens: where every text ends.
        length_penalty: above 0 it favours long texts, below 0 short ones.
        early_stopping: True ends with as many texts as beams; False where none that goes on would be better
            if it ended now; "never" where none could ever be.
    """

    def __init__(
        self,
        num_beams: int,
        *,
        eos_token_ids: Collection[int],
        max_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
    ) -> None:
        self.num_beams = num_beams
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_tokens = max_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._running: list[tuple[np.float32, tuple[int, ...]]] = [(np.float32(0), ())]
        self._finished: list[Hypothesis] = []  # best first
        self.is_over = False

    @property
    def num_candidates(self) -> int:
        """Of a beam's likeliest tokens so many decide."""
        return num_candidates(self.num_beams, len(self._eos_token_ids))

    @property
    def num_running(self) -> int:
        return len(self._running)

    def best(self, count: int) -> list[Hypothesis]:
        """The best texts that have ended."""
        return self._finished[:count]

    def advance(self, candidates: Seq[Seq[tuple[int, float]]]) -> list[Branch]:
        """The beams of the next step, best first; none where the search is over.

        Args:
            candidates: of each running beam, its likeliest tokens with their log-probabilities, best first.
        """
        assert len(candidates) == len(self._running)
        scored = [
            (self._running[parent][0] + np.float32(logprob), Branch(parent, token_id))
            for parent, found in enumerate(candidates)
            for token_id, logprob in found
        ]
        scored.sort(key=lambda pair: -pair[0])  # stable: of equals, that of the better beam
        kept = scored[: self.num_candidates]
        length = len(self._running[0][1]) + 1
        ends = [length == self._max_tokens or branch.token_id in self._eos_token_ids for _, branch in kept]
        if not (self._early_stopping is True and len(self._finished) == self.num_beams):
            for (score, branch), has_ended in zip(kept[: self.num_beams], ends, strict=False):
                if has_ended:
                    penalized = float(score / np.float32(length**self._length_penalty))
                    self._finished.append(Hypothesis(penalized, self._tokens(branch)))
            self._finished.sort(key=lambda found: -found.score)
            del self._finished[self.num_beams :]
        going = [pair for pair, has_ended in zip(kept, ends, strict=True) if not has_ended][: self.num_beams]
        if not going or self._cannot_improve(going[0][0], length):
            self.is_over = True
            return []
        self._running = [(score, self._tokens(branch)) for score, branch in going]
        return [branch for _, branch in going]

    def _tokens(self, branch: Branch) -> tuple[int, ...]:
        return (*self._running[branch.parent][1], branch.token_id)

    def _cannot_improve(self, best_running: np.float32, length: int) -> bool:
        if len(self._finished) < self.num_beams:
            return False
        if self._early_stopping is True:
            return True
        hopes_for_more = self._early_stopping == "never" and self._length_penalty > 0
        best_length = self._max_tokens if hopes_for_more else length
        possible = float(best_running / np.float32(best_length**self._length_penalty))
        return possible <= self._finished[-1].score


def num_candidates(num_beams: int, num_eos: int) -> int:
    """So many that as many as beams go on even where each of them ends in every way."""
    return max(2, 1 + num_eos) * num_beams


def most_beams(vocab_size: int, num_eos: int, num_suppressed: int = 0) -> int:
    """Beams whose candidates are told by a step, beside the tokens that cannot be among them."""
    return (min(MAX_TOP_LOGPROBS, vocab_size) - num_suppressed) // max(2, 1 + num_eos)
