"""Which sequences a step speculates on, and how far: as far as it pays.

A guessed token costs a row, and what making it took, and gives a token if it and all before it are right. Of
the likeliest guesses, as many are drafted as make the step of the most tokens a second (the goodput of Liu et
al., "Optimizing speculative decoding for serving large language models using goodput", 2024, arXiv
2406.14066): for few sequences those are deep guesses, for many none.

Nobody pays for others: drafts delay all sequences of their step, so that each has an account of what it has
won by its own, less its delays; that stays above -0.5 % of its time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate

from fastserve.engine.cost import OnlineStepCost, StepWork
from fastserve.engine.guesser import LEAST_GAIN, Account, Bounds, Guess, Guesser
from fastserve.engine.residency import Residency
from fastserve.engine.sequence import Sequence
from fastserve.engine.turn import RESERVED_BLOCKS, Turn, total_work
from fastserve.engine.verification_cost import VerificationCost
from fastserve.types import Limits

_RARE_STEPS = 4
_REFRESH_STEPS = 16
_REFUSED_STEPS = 8  # after drafts that would have harmed somebody: what can be borne grows slowly
_STEPS_WITHOUT_DRAFTS = 256  # after drafts for which there was no memory: each such step runs twice


@dataclass(slots=True)
class SpeculationCounters:
    """What has happened since the start."""

    drafted_tokens: int = 0  # guessed, and verified
    accepted_tokens: int = 0  # of these, right, and part of a completion
    guess_seconds: float = 0.0  # that a draft model has taken, what it read and tried included


class Speculator:
    """Adds drafts to the turns of a step.

    Args:
        guesser: makes them.
        cost: of a step, a draft's row by itself; its queries are read, nothing is observed.
        max_draft_tokens: of one sequence in one step.
        target_gap_seconds: no draft makes a step longer than that; None: there is no such target.
    """

    def __init__(
        self,
        residency: Residency,
        limits: Limits,
        guesser: Guesser,
        *,
        cost: OnlineStepCost,
        max_draft_tokens: int,
        target_gap_seconds: float | None = None,
    ) -> None:
        self._residency = residency
        self._limits = limits
        self.guesser = guesser
        self._cost = VerificationCost(cost)
        self._max_draft_tokens = max_draft_tokens
        self._target_gap_seconds = target_gap_seconds
        self._step_seconds = 0.0  # of the last step that had drafts, without them
        self._decode_seconds = 0.0  # of a step of these decodes, as of the last refresh
        self._clock_seconds = 0.0  # of all steps with decodes
        self._worth = 0.0  # likelihood at which a draft gives as many tokens for its seconds as a decode
        self._num_decodes = 0  # of the last step
        self._num_steps = 0
        self._refused_until = 0  # by _num_steps
        self._no_drafts_until = 0  # by _num_steps
        self._accounts: dict[int, Account] = {}  # by sequence_id
        self.counters = SpeculationCounters()
        self.last_guess_seconds = 0.0  # of the last step: what its guesses took

    def add_drafts(self, turns: list[Turn]) -> list[Turn]:
        """The turns of a step, with drafts where they pay and there are rows and free blocks left."""
        before = self.guesser.seconds
        places = [index for index, turn in enumerate(turns) if _is_decode(turn)]
        decodes = [turns[index].sequence for index in places]
        for sequence in decodes:
            if sequence.sequence_id not in self._accounts:
                self._accounts[sequence.sequence_id] = Account(self._clock_seconds)
        self._refresh(turns, places, decodes)
        bounds = self._bounds(turns, decodes)
        has_memory = self._num_steps >= self._no_drafts_until
        guesses = self.guesser.look(decodes, bounds) if has_memory else []
        lengths: Mapping[int, int] = {}
        if has_memory and self._may_pay(guesses):
            spare_seconds = max(bounds.spare_seconds() - (self.guesser.seconds - before), 0.0)
            lengths = self._choose_lengths(turns, places, decodes, guesses, spare_seconds)
        if has_memory and not lengths:
            lengths = self.guesser.trial(decodes, self._free_rows(turns), bounds)
            self._step_seconds = self._decode_seconds
        lengths = self._fit_blocks(turns, decodes, lengths) if lengths else {}
        for index, drafts in (self.guesser.guess(lengths, decodes) if lengths else {}).items():
            guide = decodes[index].guide
            if guide is not None:  # others will not come
                drafts = drafts[: guide.num_fitting(drafts)]
            if drafts:
                self._residency.grow(decodes[index], 1 + len(drafts))
                turns[places[index]] = replace(turns[places[index]], drafts=drafts)
                self.counters.drafted_tokens += len(drafts)
        self.last_guess_seconds = self.guesser.seconds - before
        self.counters.guess_seconds += self.last_guess_seconds
        return turns

    def refuse(self, num_drafts: int) -> None:
        """There was no memory for the last drafts, so many: there are none for some time."""
        self.counters.drafted_tokens -= num_drafts
        self._no_drafts_until = self._num_steps + _STEPS_WITHOUT_DRAFTS

    def observe(self, work: StepWork, seconds: float, *, is_plain: bool = True) -> None:
        """A step of so much work has run, its guesses included; a plain one has done nothing besides."""
        if is_plain and (work.draft_tokens or self._num_steps % _RARE_STEPS == 0):
            self._cost.observe(work, max(seconds - self.last_guess_seconds, 0.0))
        if work.decode_tokens:
            self._clock_seconds += seconds
            self.guesser.observe(seconds)

    def accept(self, sequence: Sequence) -> None:
        """A draft of it was right: it has saved a step."""
        self.counters.accepted_tokens += 1
        self._accounts[sequence.sequence_id].won_seconds += self._step_seconds

    def forget(self, sequence: Sequence) -> None:
        """It is finished."""
        self._accounts.pop(sequence.sequence_id, None)
        self.guesser.forget(sequence)

    def _refresh(self, turns: Seq[Turn], places: Seq[int], decodes: Seq[Sequence]) -> None:
        self._num_steps += 1
        if len(decodes) == self._num_decodes and self._num_steps % _REFRESH_STEPS:
            return
        self._num_decodes = len(decodes)
        work = total_work([turns[index] for index in places])
        most = min(self._max_draft_tokens * len(decodes), self._free_rows(turns))
        curve = self._cost.curve(work, max(most, 0))
        self._decode_seconds = curve[0]
        if curve[0] > 0:
            row_seconds = self._cost.draft_seconds(work) + self.guesser.refresh(decodes, work, curve)
            self._worth = row_seconds * len(decodes) / curve[0]

    def _bounds(self, turns: Seq[Turn], decodes: Seq[Sequence]) -> Bounds:
        return Bounds(
            worth=self._worth,
            accounts=[self._accounts[sequence.sequence_id] for sequence in decodes],
            clock_seconds=self._clock_seconds,
            spare_seconds=lambda: self._spare_seconds(turns),
        )

    def _may_pay(self, guesses: Seq[Guess]) -> bool:
        """Whether the choice is worth its own time: by the line, and if nobody is harmed."""
        num_decodes = self._num_decodes
        if self._num_steps < self._refused_until and len({index for _, index in guesses}) < num_decodes:
            return False
        gain = sum(likely - self._worth for likely, _ in guesses if likely > self._worth)
        return gain > (LEAST_GAIN - 1) * num_decodes

    def _choose_lengths(
        self,
        turns: Seq[Turn],
        places: Seq[int],
        decodes: Seq[Sequence],
        guesses: list[Guess],
        spare_seconds: float,
    ) -> Mapping[int, int]:
        """Drafts by the place of their sequence; what they cost is charged."""
        work = total_work([turns[index] for index in places])
        guesses.sort(key=lambda guess: -guess[0])
        del guesses[self._rows_left(turns, spare_seconds) :]
        # Prompts in the step are left out: a step of them alone would be as long, and have no tokens.
        verification = self._cost.curve(work, len(guesses))
        if verification[0] <= 0:  # nothing is known yet
            return {}
        making = self.guesser.curve(decodes, guesses)
        seconds = [v + m for v, m in zip(verification, making, strict=True)]
        while seconds[-1] - seconds[0] > spare_seconds:
            del seconds[-1], guesses[-1]
        chosen = guesses[: _most_goodput(len(decodes), [likely for likely, _ in guesses], seconds)]
        while chosen and not self._is_harmless(decodes, chosen, seconds):
            del chosen[len(chosen) // 2 :]
            self._refused_until = self._num_steps + _REFUSED_STEPS if not chosen else 0
        self._step_seconds = seconds[0]
        for sequence in decodes:
            self._accounts[sequence.sequence_id].won_seconds -= seconds[len(chosen)] - seconds[0]
        return Counter(index for _, index in chosen)

    def _is_harmless(self, decodes: Seq[Sequence], chosen: Seq[Guess], seconds: Seq[float]) -> bool:
        """Whether each sequence of the step wins as much by these drafts as they delay it, or can bear it."""
        delay = seconds[len(chosen)] - seconds[0]
        expected = [0.0] * len(decodes)
        for likely, index in chosen:
            expected[index] += likely * seconds[0]
        return all(
            self._accounts[sequence.sequence_id].slack_seconds(self._clock_seconds) + wins >= delay
            for sequence, wins in zip(decodes, expected, strict=True)
        )

    def _spare_seconds(self, turns: Seq[Turn]) -> float:
        """How much longer the step may become."""
        if self._target_gap_seconds is None:
            return math.inf
        return max(self._target_gap_seconds - self._cost.fitted_seconds(total_work(turns)), 0.0)

    def _free_rows(self, turns: Seq[Turn]) -> int:
        """Rows that have output rows too."""
        rows = self._limits.max_tokens - sum(turn.num_tokens for turn in turns)
        outputs = self._limits.max_outputs - sum(turn.num_outputs for turn in turns)
        return min(rows, outputs)

    def _rows_left(self, turns: Seq[Turn], spare_seconds: float) -> int:
        rows = self._free_rows(turns)
        draft_seconds = self._cost.draft_seconds(total_work(turns))
        if math.isfinite(spare_seconds) and draft_seconds > 0:
            rows = min(rows, int(spare_seconds / draft_seconds))
        return rows

    def _fit_blocks(
        self, turns: Seq[Turn], decodes: Seq[Sequence], lengths: Mapping[int, int]
    ) -> dict[int, int]:
        """As many of the drafts as the blocks of their sequence hold, and free ones that nobody will need
        soon."""
        num_spare = self._residency.pool.num_free - RESERVED_BLOCKS * len(turns)
        fitted: dict[int, int] = {}
        for index, length in lengths.items():
            sequence = decodes[index]
            if self._residency.blocks_to_grow(sequence, 1 + length) > max(num_spare, 0):
                held = len(sequence.block_table) * self._residency.pool.block_size
                length = min(length, held - sequence.num_computed_tokens - 1)
            if length > 0:
                num_spare -= self._residency.blocks_to_grow(sequence, 1 + length)
                fitted[index] = length
        return fitted


def _is_decode(turn: Turn) -> bool:
    return turn.num_tokens == 1 and len(turn.outputs) == 1


def _most_goodput(num_decodes: int, likelihoods: Seq[float], seconds: Seq[float]) -> int:
    """How many of the drafts, the likeliest first, give the most tokens a second."""
    tokens = accumulate(likelihoods, initial=float(num_decodes))
    rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
    best = max(range(len(rates)), key=rates.__getitem__)
    return best if rates[best] >= LEAST_GAIN * rates[0] else 0
