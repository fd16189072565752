"""When a draft model guesses, and for whom: where what it takes is less than what it saves.

Its guesses cost seconds of its own, and so does what it must read before the first: a text is read where the
tokens that may yet come are worth it. What they are worth is not known without trying: a small share of the
time goes to trials, whose drafts are verified though they may not pay; the less comes of them, the smaller
the share.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from fastserve.engine.acceptance import Acceptance
from fastserve.engine.cost import StepWork
from fastserve.engine.draft_model import DraftModel
from fastserve.engine.guesser import (
    ENGINE_MEMORY,
    LEAST_GAIN,
    SEQUENCE_MEMORY,
    Bounds,
    Guess,
    room_for_drafts,
)
from fastserve.engine.sequence import Sequence

_FIRST_TRIALS_STEPS = 32  # whose time may go to trials to begin with, until a gain shows
_MOST_TRIAL_STEPS = 8  # whose time may be in store later
_MOST_TRIAL_DELAY = 0.02  # of the time of the sequences that it delays
_MOST_TRIAL_SHARE, _LEAST_TRIAL_SHARE = 0.005, 0.0005  # of the time of steps with decodes
_DISCOURAGEMENT = 0.8  # by a trial, of the share, as long as there is no gain
_TRIAL_TOKENS = 4  # drafts of one
_MOST_UNREAD = 16  # tokens: with more of its text to read, a sequence is not guessed at beside the others
_READING_STEPS = 4  # in one of which texts are read: whether that is worth it takes time to say, too
_LEAST_LEFT = 32  # tokens, that a completion is expected to go on for; later, as many as it has
_FORECAST_SHARE = 0.5  # of what reading a text may bring, that is reckoned with

logger = logging.getLogger(__name__)


class DraftGuesser:
    """A Guesser by a draft model.

    Args:
        model: is the guesser's from here on.
        max_draft_tokens: of one sequence in one step.
    """

    def __init__(self, model: DraftModel, *, max_draft_tokens: int) -> None:
        self.model = model
        self._max_draft_tokens = max_draft_tokens
        self._overall = Acceptance(memory=ENGINE_MEMORY)  # whatever was right before
        self.acceptance = Acceptance(memory=ENGINE_MEMORY, prior=self._overall)
        self._acceptances: dict[int, Acceptance] = {}  # by sequence_id
        self._reading_seconds: dict[int, float] = {}  # that its text has taken, by sequence_id
        self._decode_curve: list[float] = [0.0]  # seconds of a step that verifies so many drafts
        self._guess_seconds = 0.0  # of a step of guesses, one for each decode
        self._gain = 1.0  # tokens a second with as many drafts as is best, over those without
        self._is_beginning = True
        self._trial_steps = float(_FIRST_TRIALS_STEPS)  # in store: their time
        self._trial_share = _MOST_TRIAL_SHARE
        self._is_trial = False  # what is guessed next
        self._num_steps = 0
        self._is_broken = False

    @property
    def seconds(self) -> float:
        return self.model.seconds

    def refresh(self, decodes: Seq[Sequence], work: StepWork, curve: Seq[float]) -> float:
        if not decodes:
            return 0.0
        self._decode_curve = list(curve)
        self._guess_seconds = self.model.cost.seconds(
            StepWork(decode_tokens=work.decode_tokens, attended_tokens=work.attended_tokens)
        )
        self._gain = self._best_gain(self.acceptance, len(decodes))
        return self._guess_seconds / len(decodes)

    def look(self, decodes: Seq[Sequence], bounds: Bounds) -> list[Guess]:
        if self._is_broken or not decodes:
            return []
        self._is_trial = False
        self._num_steps += 1
        self.model.release_absent()
        for sequence in decodes:
            self.model.follow(sequence)
        if self._learn():
            self._gain = self._best_gain(self.acceptance, len(decodes))
        if self._gain >= LEAST_GAIN:
            self._end_beginning()
            self._trial_share = _MOST_TRIAL_SHARE
            if self._num_steps % _READING_STEPS == 0:
                self._read(decodes, bounds)
        return [
            (likely, index)
            for index, sequence in enumerate(decodes)
            if self.model.num_unread(sequence) <= _MOST_UNREAD
            for likely in self._likelihoods(sequence, bounds.least_likelihood)
        ]

    def curve(self, decodes: Seq[Sequence], guesses: Seq[Guess]) -> list[float]:
        """A step of the model makes one guess each for all that have so many: a deeper one than all before
        costs a step, any other a row."""
        cost = self.model.cost.model
        depths = [0] * len(decodes)
        deepest = 0
        seconds = [0.0]
        for _, index in guesses:
            sequence = decodes[index]
            more = cost.decode_seconds + cost.attended_seconds * len(sequence.token_ids)
            if depths[index] == 0:
                more += cost.draft_seconds * (self.model.num_unread(sequence) - 1)
            depths[index] += 1
            if depths[index] > deepest:
                deepest = depths[index]
                more += cost.fixed_seconds
            seconds.append(seconds[-1] + more)
        return seconds

    def trial(self, decodes: Seq[Sequence], num_rows: int, bounds: Bounds) -> dict[int, int]:
        """A few guesses at the sequence with the least to read, where that fits what is in store."""
        num_tokens = min(_TRIAL_TOKENS, self._max_draft_tokens, len(self._decode_curve) - 1, num_rows)
        if self._trial_steps <= 0:
            self._end_beginning()
            return {}
        if self._is_broken or self._gain >= LEAST_GAIN or num_tokens < 1:
            return {}
        places = [i for i, s in enumerate(decodes) if self._room(s) >= num_tokens]
        if not places:
            return {}
        index = min(places, key=lambda i: self.model.num_unread(decodes[i]))
        seconds_left = min(self._trial_steps * self._decode_curve[0], bounds.spare_seconds())
        if not self._is_beginning:
            lived = sum(bounds.clock_seconds - account.since_seconds for account in bounds.accounts)
            seconds_left = min(seconds_left, _MOST_TRIAL_DELAY * lived / len(decodes))
        cost = self.model.cost.model
        expected = cost.prefill_seconds_of(self.model.num_unread(decodes[index]))
        expected += num_tokens * cost.fixed_seconds + self._decode_curve[num_tokens] - self._decode_curve[0]
        if expected > seconds_left:
            if self._trial_steps < _MOST_TRIAL_STEPS:
                self._end_beginning()
            return {}
        self._is_trial = True
        return {index: num_tokens}

    def guess(self, lengths: Mapping[int, int], decodes: Seq[Sequence]) -> dict[int, tuple[int, ...]]:
        wanted = [(decodes[index], length) for index, length in lengths.items()]
        drafts: list[tuple[int, ...]] = []
        before = self.model.seconds
        self._run(lambda: drafts.extend(self.model.guess(wanted)))
        if self._is_trial:
            self._is_trial = False
            seconds = self.model.seconds - before
            seconds += self._decode_curve[sum(map(len, drafts))] - self._decode_curve[0]
            self._trial_steps -= seconds / self._decode_curve[0]
            self._trial_share = max(self._trial_share * _DISCOURAGEMENT, _LEAST_TRIAL_SHARE)
        return dict(zip(lengths, drafts, strict=False))

    def observe(self, seconds: float) -> None:
        if not self._is_beginning:
            self._trial_steps = min(self._trial_steps + self._trial_share, _MOST_TRIAL_STEPS)

    def forget(self, sequence: Sequence) -> None:
        self.model.release(sequence.sequence_id)
        self._acceptances.pop(sequence.sequence_id, None)
        self._reading_seconds.pop(sequence.sequence_id, None)

    def check_invariants(self) -> None:
        self.model.check_invariants()

    def _learn(self) -> bool:
        """Whether there was anything to be learned."""
        observations = self.model.take_observations()
        for seen in observations:
            self._overall.observe(0, seen.is_right)
            self.acceptance.observe(seen.match_length, seen.is_right)
            own = self._acceptances.get(seen.sequence_id)
            if own is None:
                own = Acceptance(memory=SEQUENCE_MEMORY, prior=self.acceptance)
                self._acceptances[seen.sequence_id] = own
            own.observe(seen.match_length, seen.is_right)
        return bool(observations)

    def _end_beginning(self) -> None:
        if self._is_beginning:
            self._is_beginning = False
            self._trial_steps = 0.0

    def _best_gain(self, acceptance: Acceptance, num_decodes: int) -> float:
        """Tokens a second over those without drafts, where all decodes have as many as is best."""
        best, likelihood, tokens = 1.0, 1.0, 1.0
        for depth in range(1, self._max_draft_tokens + 1):
            likelihood *= acceptance.rate(depth - 1)
            tokens += likelihood
            num_drafts = depth * num_decodes
            if num_drafts >= len(self._decode_curve):
                break
            seconds = self._decode_curve[num_drafts] + depth * self._guess_seconds
            best = max(best, tokens * self._decode_curve[0] / seconds)
        return best

    def _read(self, decodes: Seq[Sequence], bounds: Bounds) -> None:
        """Let the model read on in texts where that is worth it, and harms nobody."""
        unread = [index for index, s in enumerate(decodes) if self.model.num_unread(s) > _MOST_UNREAD]
        if not unread:
            return
        cost = self.model.cost.model
        costs = dict.fromkeys(range(len(decodes)), 0.0)
        costs |= {i: cost.prefill_seconds_of(self.model.num_unread(decodes[i])) for i in unread}
        gains = [self._forecast(sequence, len(decodes)) for sequence in decodes]
        chosen = [index for index in sorted(unread, key=costs.__getitem__) if gains[index] > costs[index]]
        # The others have something of their own guesses to set against the delay, or nothing at all.
        slacks = [account.slack_seconds(bounds.clock_seconds) for account in bounds.accounts]
        others = [index for index in costs if gains[index] <= costs[index]]
        num_tokens = self._most_tokens(
            min((bounds.spare_seconds(), *(slacks[index] for index in others))), decodes, chosen
        )
        delay = cost.fixed_seconds
        for place, index in enumerate(chosen):
            delay += costs[index]
            if delay > min(gains[i] for i in chosen[: place + 1]):
                del chosen[place:]
                break
        if not chosen or num_tokens < 1:
            return
        before = self.model.seconds
        self._run(lambda: self.model.read([decodes[index] for index in chosen], num_tokens))
        self._learn()
        seconds = self.model.seconds - before
        for index, sequence in enumerate(decodes):
            if index in chosen:
                spent = self._reading_seconds.get(sequence.sequence_id, 0.0)
                self._reading_seconds[sequence.sequence_id] = spent + seconds
            else:
                bounds.accounts[index].won_seconds -= seconds

    def _forecast(self, sequence: Sequence, num_decodes: int) -> float:
        """Seconds that guesses at the rest of a completion may save it, less those that reading it took."""
        own = self._acceptances.get(sequence.sequence_id)
        gain = self._gain if own is None else self._best_gain(own, num_decodes)
        if gain < LEAST_GAIN:
            return 0.0
        num_left = min(self._room(sequence), max(sequence.num_completion_tokens, _LEAST_LEFT))
        saved = _FORECAST_SHARE * num_left * self._decode_curve[0] * (1 - 1 / gain)
        return saved - self._reading_seconds.get(sequence.sequence_id, 0.0)

    def _most_tokens(self, most_seconds: float, decodes: Seq[Sequence], chosen: Seq[int]) -> int:
        """How many tokens of these texts may be read within so many seconds."""
        most = self.model.limits.max_tokens
        if not chosen or math.isinf(most_seconds):
            return most
        cost = self.model.cost.model
        position = max(self.model.num_unread(decodes[index]) for index in chosen)
        row_seconds = cost.prefill_seconds + cost.attended_seconds * position
        left = most_seconds - cost.fixed_seconds
        if left <= 0:
            return 0
        return most if row_seconds <= 0 else min(most, int(left / row_seconds))

    def _likelihoods(self, sequence: Sequence, least: float) -> list[float]:
        """Of its guesses, one after the other, that each and all before it are right, as far as they are
        likely enough."""
        own = self._acceptances.get(sequence.sequence_id, self.acceptance)
        match_length = self.model.match_length(sequence)
        most = min(self._max_draft_tokens, self._room(sequence))
        rates = (own.rate(match_length + index) for index in range(most))
        likelihoods: list[float] = []
        probability = 1.0
        for rate in rates:
            probability *= rate
            if probability <= least:
                break
            likelihoods.append(probability)
        return likelihoods

    def _room(self, sequence: Sequence) -> int:
        """How many tokens may yet be guessed of it."""
        left = self.model.limits.max_context - len(sequence.token_ids)
        return max(min(left, room_for_drafts(sequence)), 0)

    def _run(self, run: Callable[[], object]) -> None:
        """Let the model run. Guesses can be done without: where that fails, there are none from then on."""
        try:
            run()
        except Exception:
            logger.exception("the draft model failed: there are no drafts from here on")
            self._is_broken = True
