"""Which sequences a step speculates on, and how far: as far as it pays.

A guessed token costs a row, and gives a token if it and all before it are right. Of the likeliest guesses, as
many are drafted as make the step of the most tokens a second (the goodput of Liu et al., "Optimizing
speculative decoding for serving large language models using goodput", 2024, arXiv 2406.14066): for few
sequences those are deep guesses, for many none.

Nobody pays for others: drafts delay all sequences of their step, so that each has an account of what it has
won by its own, less its delays; that stays above -0.5 % of its time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate

from fastserve.engine.acceptance import Acceptance
from fastserve.engine.cost import OnlineStepCost, StepWork
from fastserve.engine.prompt_lookup import PromptLookup
from fastserve.engine.residency import Residency
from fastserve.engine.sequence import Sequence
from fastserve.engine.turn import Turn, total_work
from fastserve.engine.verification_cost import VerificationCost
from fastserve.types import Limits

_LEAST_GAIN = 1.05  # in tokens a second, of a step with drafts: both sides are estimates
_LEAST_WORTH = 0.7  # tokens for its seconds, of a draft, over those of a decode: less is not even considered
_BEARABLE_DELAY = 0.005  # of a sequence's time, by drafts of others and by its own that come to nothing
_RESERVED_BLOCKS = 2  # free blocks for each turn that guesses leave to what is certain
_NUM_LOOKED_AT = 2  # sequences whose texts gave nothing to guess, in one step: looking costs time as well
_FRUITLESS_LOOKS = 8  # at a text, after which it is looked at in every fourth step
_RARE_STEPS = 4
_REFRESH_STEPS = 16
_REFUSED_STEPS = 8  # after drafts that would have harmed somebody: what can be borne grows slowly
_SEQUENCE_MEMORY = 30  # guesses
_ENGINE_MEMORY = 300


@dataclass(slots=True)
class SpeculationCounters:
    """What has happened since the start."""

    drafted_tokens: int = 0  # guessed, and verified
    accepted_tokens: int = 0  # of these, right, and part of a completion


@dataclass(slots=True)
class _Subject:
    """A sequence that decodes, and what is known of guesses at it."""

    lookup: PromptLookup
    acceptance: Acceptance
    since_seconds: float  # by the Speculator's clock
    won_seconds: float = 0.0  # by drafts of its own, less the delays by all
    is_promising: bool = False  # the last look has given drafts worth considering
    num_fruitless: int = 0  # looks since one that has


class Speculator:
    """Adds drafts to the turns of a step.

    Every guess is checked against the tokens that come, whether rows were spent on it or not: what a text is
    worth is known without trying.

    Args:
        cost: of a step, a draft's row by itself; its queries are read, nothing is observed.
        max_draft_tokens: of one sequence in one step.
        prompt_lookup_min, prompt_lookup_max: see PromptLookup.
        target_gap_seconds: no draft makes a step longer than that; None: there is no such target.
    """

    def __init__(
        self,
        residency: Residency,
        limits: Limits,
        *,
        cost: OnlineStepCost,
        max_draft_tokens: int,
        prompt_lookup_min: int,
        prompt_lookup_max: int,
        target_gap_seconds: float | None = None,
    ) -> None:
        self._residency = residency
        self._limits = limits
        self._cost = VerificationCost(cost)
        self._max_draft_tokens = max_draft_tokens
        self._ngrams = prompt_lookup_min, prompt_lookup_max
        self._target_gap_seconds = target_gap_seconds
        self._acceptance = Acceptance(memory=_ENGINE_MEMORY)
        self._step_seconds = 0.0  # of the last step that had drafts, without them
        self._clock_seconds = 0.0  # of all steps with decodes
        self._worth = 0.0  # likelihood at which a draft gives as many tokens for its seconds as a decode
        self._num_decodes = 0  # of the last step
        self._num_steps = 0
        self._refused_until = 0  # by _num_steps
        self._subjects: dict[int, _Subject] = {}  # by sequence_id
        self.counters = SpeculationCounters()

    def add_drafts(self, turns: list[Turn]) -> list[Turn]:
        """The turns of a step, with drafts where they pay and there are rows and free blocks left."""
        decodes = [index for index, turn in enumerate(turns) if _is_decode(turn)]
        guesses = self._look(turns, decodes)
        lengths = self._choose_lengths(turns, decodes, guesses) if self._may_pay(decodes, guesses) else {}
        num_spare = self._residency.pool.num_free - _RESERVED_BLOCKS * len(turns)
        for index, length in lengths.items():
            sequence = turns[index].sequence
            length = self._fit_blocks(sequence, length, num_spare)
            if length:
                num_spare -= self._residency.blocks_to_grow(sequence, 1 + length)
                self._residency.grow(sequence, 1 + length)
                drafts = tuple(self._subjects[sequence.sequence_id].lookup.guess(length))
                if sequence.guide is not None:  # others will not come
                    drafts = drafts[: sequence.guide.num_fitting(drafts)]
                turns[index] = replace(turns[index], drafts=drafts)
                self.counters.drafted_tokens += len(drafts)
        return turns

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step of so much work has run."""
        if work.draft_tokens or self._num_steps % _RARE_STEPS == 0:
            self._cost.observe(work, seconds)
        if work.decode_tokens:
            self._clock_seconds += seconds

    def accept(self, sequence: Sequence) -> None:
        """A draft of it was right: it has saved a step."""
        self.counters.accepted_tokens += 1
        self._subjects[sequence.sequence_id].won_seconds += self._step_seconds

    def forget(self, sequence: Sequence) -> None:
        """It is finished."""
        self._subjects.pop(sequence.sequence_id, None)

    def _look(self, turns: Seq[Turn], decodes: Seq[int]) -> list[tuple[float, int]]:
        """Drafts that are likely enough to be considered: (likelihood, index of the turn)."""
        self._refresh(turns, decodes)
        guesses: list[tuple[float, int]] = []
        num_left, num_decodes = _NUM_LOOKED_AT, len(decodes)
        for count in range(num_decodes):
            index = decodes[(self._num_steps * _NUM_LOOKED_AT + count) % num_decodes]
            sequence = turns[index].sequence
            subject = self._subjects.get(sequence.sequence_id)
            if subject is None:
                subject = self._subjects[sequence.sequence_id] = self._make_subject()
            is_rare = subject.num_fruitless >= _FRUITLESS_LOOKS and self._num_steps % _RARE_STEPS
            if subject.is_promising or (num_left and not is_rare):
                num_left -= not subject.is_promising
                self._read(subject, sequence)
                likelihoods = self._likelihoods(sequence, subject)
                subject.is_promising = bool(likelihoods)
                subject.num_fruitless = 0 if likelihoods else subject.num_fruitless + 1
                guesses += [(likely, index) for likely in likelihoods]
        return guesses

    def _refresh(self, turns: Seq[Turn], decodes: Seq[int]) -> None:
        self._num_steps += 1
        if len(decodes) == self._num_decodes and self._num_steps % _REFRESH_STEPS:
            return
        self._num_decodes = len(decodes)
        work = total_work([turns[index] for index in decodes])
        step_seconds = self._cost.seconds(work, 0)
        if step_seconds > 0:
            self._worth = self._cost.draft_seconds(work) * len(decodes) / step_seconds

    def _may_pay(self, decodes: Seq[int], guesses: Seq[tuple[float, int]]) -> bool:
        """Whether the choice is worth its own time: by the line, and if nobody is harmed."""
        if self._num_steps < self._refused_until and len({index for _, index in guesses}) < len(decodes):
            return False
        gain = sum(likely - self._worth for likely, _ in guesses if likely > self._worth)
        return gain > (_LEAST_GAIN - 1) * len(decodes)

    def _choose_lengths(
        self, turns: Seq[Turn], decodes: Seq[int], guesses: list[tuple[float, int]]
    ) -> dict[int, int]:
        """Drafts by the index of their turn; what they cost is charged."""
        subjects = {index: self._subjects[turns[index].sequence.sequence_id] for index in decodes}
        work = total_work([turns[index] for index in decodes])
        guesses.sort(key=lambda guess: -guess[0])
        del guesses[self._rows_left(turns) :]
        # Prompts in the step are left out: a step of them alone would be as long, and have no tokens.
        seconds = self._cost.curve(work, len(guesses))
        if seconds[0] <= 0:  # nothing is known yet
            return {}
        chosen = guesses[: _most_goodput(len(decodes), [likely for likely, _ in guesses], seconds)]
        while chosen and not self._is_harmless(subjects, chosen, seconds):
            del chosen[len(chosen) // 2 :]
            self._refused_until = self._num_steps + _REFUSED_STEPS if not chosen else 0
        self._step_seconds = seconds[0]
        for subject in subjects.values():
            subject.won_seconds -= seconds[len(chosen)] - seconds[0]
        return Counter(index for _, index in chosen)

    def _is_harmless(
        self, subjects: Mapping[int, _Subject], chosen: Seq[tuple[float, int]], seconds: Seq[float]
    ) -> bool:
        """Whether each sequence of the step wins as much by these drafts as they delay it, or can bear it."""
        delay = seconds[len(chosen)] - seconds[0]
        expected = dict.fromkeys(subjects, 0.0)
        for likely, index in chosen:
            expected[index] += likely * seconds[0]
        return all(
            s.won_seconds + _BEARABLE_DELAY * (self._clock_seconds - s.since_seconds) + expected[index]
            >= delay
            for index, s in subjects.items()
        )

    def _read(self, subject: _Subject, sequence: Sequence) -> None:
        """Take note of its newest tokens."""
        for match_length, is_right in subject.lookup.read(sequence.token_ids):
            subject.acceptance.observe(match_length, is_right)
            self._acceptance.observe(match_length, is_right)

    def _likelihoods(self, sequence: Sequence, subject: _Subject) -> list[float]:
        """Of its drafts, one after the other, that each and all before it are right, as far as they are
        likely enough."""
        likelihoods: list[float] = []
        if subject.lookup.has_guess:
            # The step gives a token beyond the drafts that are right: the last of all is never drafted.
            room = sequence.max_length - len(sequence.token_ids) - 1
            probability = 1.0
            for index in range(min(self._max_draft_tokens, room)):
                probability *= subject.acceptance.rate(subject.lookup.match_length + index)
                if probability <= _LEAST_WORTH * self._worth:
                    break
                likelihoods.append(probability)
        return likelihoods

    def _make_subject(self) -> _Subject:
        least, most = self._ngrams
        return _Subject(
            PromptLookup(least_ngram=least, most_ngram=most),
            Acceptance(memory=_SEQUENCE_MEMORY, prior=self._acceptance),
            since_seconds=self._clock_seconds,
        )

    def _rows_left(self, turns: Seq[Turn]) -> int:
        rows = self._limits.max_tokens - sum(turn.num_tokens for turn in turns)
        outputs = self._limits.max_outputs - sum(len(turn.outputs) for turn in turns)
        rows = min(rows, outputs)
        draft_seconds = self._cost.draft_seconds(total_work(turns))
        if self._target_gap_seconds is not None and draft_seconds > 0:
            slack = self._target_gap_seconds - self._cost.fitted_seconds(total_work(turns))
            rows = min(rows, int(max(slack, 0.0) / draft_seconds))
        return rows

    def _fit_blocks(self, sequence: Sequence, length: int, num_spare: int) -> int:
        """As many of the drafts as its blocks hold, and free ones that nobody will need soon."""
        if self._residency.blocks_to_grow(sequence, 1 + length) <= max(num_spare, 0):
            return length
        held = len(sequence.block_table) * self._residency.pool.block_size
        return min(length, held - sequence.num_computed_tokens - 1)


def _is_decode(turn: Turn) -> bool:
    return turn.num_tokens == 1 and len(turn.outputs) == 1


def _most_goodput(num_decodes: int, likelihoods: Seq[float], seconds: Seq[float]) -> int:
    """How many of the drafts, the likeliest first, give the most tokens a second."""
    tokens = accumulate(likelihoods, initial=float(num_decodes))
    rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
    best = max(range(len(rates)), key=rates.__getitem__)
    return best if rates[best] >= _LEAST_GAIN * rates[0] else 0
