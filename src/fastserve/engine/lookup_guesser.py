"""Guesses read off the sequences' own texts. Every one is checked against the tokens that come, whether rows
were spent on it or not: what a text is worth is known without trying."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.engine.acceptance import Acceptance
from fastserve.engine.cost import StepWork
from fastserve.engine.guesser import ENGINE_MEMORY, SEQUENCE_MEMORY, Bounds, Guess, room_for_drafts
from fastserve.engine.prompt_lookup import PromptLookup
from fastserve.engine.sequence import Sequence

_NUM_LOOKED_AT = 2  # sequences whose texts gave nothing to guess, in one step: looking costs time as well
_FRUITLESS_LOOKS = 8  # at a text, after which it is looked at in every fourth step
_RARE_STEPS = 4


@dataclass(slots=True)
class _Text:
    """What is known of guesses at one sequence."""

    lookup: PromptLookup
    acceptance: Acceptance
    is_promising: bool = False  # the last look has given drafts worth considering
    num_fruitless: int = 0  # looks since one that has


class LookupGuesser:
    """A Guesser by prompt lookup.

    Args:
        max_draft_tokens: of one sequence in one step.
        prompt_lookup_min, prompt_lookup_max: see PromptLookup.
    """

    def __init__(self, *, max_draft_tokens: int, prompt_lookup_min: int, prompt_lookup_max: int) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._ngrams = prompt_lookup_min, prompt_lookup_max
        self.acceptance = Acceptance(memory=ENGINE_MEMORY)
        self._num_steps = 0
        self._texts: dict[int, _Text] = {}  # by sequence_id

    @property
    def seconds(self) -> float:
        return 0.0  # looking is part of a step's own time, and too little to be told apart

    def refresh(self, decodes: Seq[Sequence], work: StepWork, curve: Seq[float]) -> float:
        return 0.0

    def look(self, decodes: Seq[Sequence], bounds: Bounds) -> list[Guess]:
        self._num_steps += 1
        guesses: list[Guess] = []
        num_left, num_decodes = _NUM_LOOKED_AT, len(decodes)
        for count in range(num_decodes):
            index = (self._num_steps * _NUM_LOOKED_AT + count) % num_decodes
            sequence = decodes[index]
            text = self._texts.get(sequence.sequence_id)
            if text is None:
                text = self._texts[sequence.sequence_id] = self._make_text()
            is_rare = text.num_fruitless >= _FRUITLESS_LOOKS and self._num_steps % _RARE_STEPS
            if text.is_promising or (num_left and not is_rare):
                num_left -= not text.is_promising
                self._read(text, sequence)
                likelihoods = self._likelihoods(sequence, text, bounds.least_likelihood)
                text.is_promising = bool(likelihoods)
                text.num_fruitless = 0 if likelihoods else text.num_fruitless + 1
                guesses += [(likely, index) for likely in likelihoods]
        return guesses

    def curve(self, decodes: Seq[Sequence], guesses: Seq[Guess]) -> list[float]:
        return [0.0] * (len(guesses) + 1)

    def trial(self, decodes: Seq[Sequence], num_rows: int, bounds: Bounds) -> dict[int, int]:
        return {}  # every guess is compared anyway

    def guess(self, lengths: Mapping[int, int], decodes: Seq[Sequence]) -> dict[int, tuple[int, ...]]:
        return {
            index: tuple(self._texts[decodes[index].sequence_id].lookup.guess(length))
            for index, length in lengths.items()
        }

    def observe(self, seconds: float) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        self._texts.pop(sequence.sequence_id, None)

    def check_invariants(self) -> None:
        pass

    def _read(self, text: _Text, sequence: Sequence) -> None:
        """Take note of its newest tokens."""
        for match_length, is_right in text.lookup.read(sequence.token_ids):
            text.acceptance.observe(match_length, is_right)
            self.acceptance.observe(match_length, is_right)

    def _likelihoods(self, sequence: Sequence, text: _Text, least: float) -> list[float]:
        """Of its drafts, one after the other, that each and all before it are right, as far as they are
        likely enough."""
        likelihoods: list[float] = []
        if text.lookup.has_guess:
            probability = 1.0
            for index in range(min(self._max_draft_tokens, room_for_drafts(sequence))):
                probability *= text.acceptance.rate(text.lookup.match_length + index)
                if probability <= least:
                    break
                likelihoods.append(probability)
        return likelihoods

    def _make_text(self) -> _Text:
        least, most = self._ngrams
        return _Text(
            PromptLookup(least_ngram=least, most_ngram=most),
            Acceptance(memory=SEQUENCE_MEMORY, prior=self.acceptance),
        )
