"""`boost`: in order of arrival, brought forward by how little work is expected.

After Yu and Scully, "Strongly Tail-Optimal Scheduling in the Light-Tailed M/G/1" (SIGMETRICS 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.engine.clock import Interval
from fastserve.engine.length import next_mark
from fastserve.engine.policy.backlog import Backlog
from fastserve.engine.policy.due import DueQueue
from fastserve.engine.policy.policy import RankedPolicy
from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.sequence import Sequence
from fastserve.errors import OptionError

_SCALE_STEP = 1.25  # scales within such a factor count as equal: ranks change together, and seldom
_SMOOTHING_SECONDS = 5.0  # of the wait that the scale follows
_CHECK_SECONDS = 0.1  # between two looks for those that are due
_LEAST_PATIENCE_SECONDS = 2.0  # before which nobody is due
_GRACE = 1.8  # times as long may wait who is shorter
_LONG_QUANTILE = 0.98  # of lengths, as which a completion counts for when it is due
_STEP_MEMORY = 0.02  # weight of a step in the mean seconds of a step
_STEADY = 0.75  # of the longest wait of late: where the mean is above it, patience fades to 1
_LANE_SHARE = 1 / 8  # of a step's sequences, that may be on the express lane
_EXPRESS, _RUNNING, _DUE, _NORMAL = range(4)  # first part of a rank


@dataclass(slots=True)
class Standing:
    """What the policy remembers of a sequence."""

    work_seconds: float  # expected when it came, or when costs and lengths were known
    has_begun: bool = False  # it had its first one
    next_mark: int = 0  # tokens of the completion at which it is looked at again


class Boost(RankedPolicy):
    """A sequence's key is its arrival less its boost, -t ln(1 - 1 / E[exp(W / t)]): about t ln(t / W) where
    its expected work W is less than the scale t, nothing where it is more. The lower key goes first.

    A scale near 0 is first come, first served; a large one is shortest expected work first. It follows the
    load: `strength` times what a newcomer would wait for if all were served as they came, so that hardly
    anybody is overtaken while nobody waits, and a backlog is worked off in the order of work.

    That holds as long as everybody can still begin within `patience` times the longest such wait of late
    (and later, if its completion is likely to be shorter than others are, but within 1.8 times as long).
    Where the wait has been close to the longest for minutes, which makes the longest what most have to wait,
    patience fades to 1. As soon as one could not any more, if those that are due before it began first, it
    is due with them, in the order of the times by which they are to begin, and nobody else begins before
    them. As long as costs and lengths are guesses, no wait is remembered: that of now counts
    as the longest.

    Besides, a boost is at most `most_boost` scales, and a scale at most `most_scale_seconds` (and a fifth, as
    scales are rounded): by its key, nobody is overtaken by a sequence that came later by more than their
    product.

    Work is that of the prompt and of the tokens to be expected, given how many there are; it is looked at
    again when a completion has grown by a third. Streams have their turns before those that wait, but their
    memory may be taken for a better key.

    A prompt that takes less than `express_seconds` is read at once, by an express lane for an eighth of a
    step's sequences, which each leaves with its first token; it is closed while somebody is due.

    Args:
        work: what is expected of sequences.
        max_sequences: of a step.
        strength: of the scale that follows the load; 0 leaves it at least_scale_seconds.
        patience: see above; a small one brings the tail to that of first come, first served.
        least_scale_seconds: t while nobody waits.
        margin: a sequence takes the memory of another whose key is so many scales later.
    """

    name = "boost"

    def __init__(
        self,
        work: ExpectedWork,
        *,
        max_sequences: int,
        strength: float = 7.0,
        patience: float = 1.3,
        least_scale_seconds: float = 2.0,
        most_scale_seconds: float = 1000.0,
        most_boost: float = 12.0,
        express_seconds: float = 0.05,
        margin: float = 2.0,
    ) -> None:
        if least_scale_seconds > most_scale_seconds:
            raise OptionError(
                f"boost: least_scale_seconds={least_scale_seconds:g} is more than "
                f"most_scale_seconds={most_scale_seconds:g}",
                hint="raise the one or lower the other",
            )
        self._work = work
        self._strength = strength
        self._patience = patience
        self._least_scale = least_scale_seconds
        self._most_scale = most_scale_seconds
        self._most_boost = most_boost
        self._express_seconds = express_seconds
        self._margin = margin
        self._lane_size = max(int(_LANE_SHARE * max_sequences), 1)
        # By sequence_id, who has no token yet ...
        self._waiting = DueQueue()
        self._due: dict[int, Sequence] = {}
        self._lane: dict[int, Sequence] = {}  # ... and is on the express lane, or ...
        self._short: dict[int, dict[int, Sequence]] = {}  # ... would be, were there room; first by class
        self._streams: dict[int, Sequence] = {}  # ... and who has
        self._backlog = Backlog()
        self._is_informed = False  # whether what the backlog was told of work is more than a guess
        self._checks = Interval(_CHECK_SECONDS)
        self._step_seconds = 0.0  # mean over steps
        self._wait = 0.0  # smoothed
        self._wait_seconds: float | None = None  # when it was looked at
        self._scale_index = round(math.log(least_scale_seconds) / math.log(_SCALE_STEP))

    @property
    def scale_seconds(self) -> float:
        """t."""
        return _SCALE_STEP**self._scale_index

    def longest_wait_seconds(self, now: float) -> float:
        """For a first turn, where the completion is a long one; who is shorter may wait for longer."""
        share = min((1.0 - self._backlog.steadiness) / (1.0 - _STEADY), 1.0)
        patience = min(self._patience, 1.0 + (self._patience - 1.0) * share)
        # A guess is not to be remembered: one ten times too high would let everybody wait for minutes.
        wait = self._backlog.peak_seconds(now) if self._is_informed else self._backlog.wait_seconds
        return max(patience * wait, _LEAST_PATIENCE_SECONDS)

    def enter(self, sequence: Sequence, now: float) -> None:
        work = self._work.seconds(sequence)
        standing = sequence.standing = Standing(work)
        sequence_id = sequence.sequence_id
        if sequence.num_completion_tokens:
            self._streams[sequence_id] = sequence
        elif sequence.is_started:
            standing.has_begun = True
            self._waiting.add(sequence, self._due_order(sequence), None)
        else:
            self._backlog.add(work)
            self._waiting.add(sequence, self._due_order(sequence), work)
            is_short = self._work.prefill_seconds(sequence) < self._express_seconds
            if is_short and not sequence.inherited_seconds:
                self._short.setdefault(sequence.class_index, {})[sequence_id] = sequence
        self._rank(sequence)
        self._fill_lane()

    def leave(self, sequence: Sequence) -> None:
        standing: Standing = sequence.standing
        is_stream = self._streams.pop(sequence.sequence_id, None) is not None
        if not is_stream:
            self._forget_waiting(sequence)
            if not standing.has_begun:
                self._backlog.remove(standing.work_seconds)
        self._due.pop(sequence.sequence_id, None)
        super().leave(sequence)

    def serve(self, sequences: Seq[Sequence], seconds: float, now: float) -> None:
        self._backlog.pass_time(seconds)
        self._step_seconds += (seconds - self._step_seconds) * (_STEP_MEMORY if self._step_seconds else 1.0)
        for sequence in sequences:
            standing: Standing = sequence.standing
            if len(sequence.token_ids) - sequence.num_prompt_tokens >= standing.next_mark:
                self._advance(sequence)

    def refresh(self, sequences: Seq[Sequence], now: float) -> None:
        if self._work.is_known and not self._is_informed:
            self._reckon_anew(sequences)
        if self._follow(self._backlog.wait_seconds, now):
            for sequence in sequences:
                self._rank(sequence)
        if self._checks.is_over(now):
            self._find_due(now)
        for sequence in [s for s in self._lane.values() if s.num_completion_tokens]:
            self._advance(sequence)
        self._fill_lane()

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        if better.rank[0] != _NORMAL or resident.rank[0] not in (_RUNNING, _NORMAL):
            return False
        return bool(better.rank[1] + self._margin * self.scale_seconds < resident.rank[1])

    def _reckon_anew(self, sequences: Seq[Sequence]) -> None:
        """What was guessed of everybody's work until now is known. Who is due, or on the lane, stays so."""
        self._is_informed = True
        self._backlog = Backlog()
        for sequence in sequences:
            standing: Standing = sequence.standing
            if sequence.sequence_id not in self._streams:
                self._waiting.remove(sequence)
                work = None
                if not standing.has_begun:
                    work = standing.work_seconds = self._work.seconds(sequence)
                    self._backlog.add(work)
                self._waiting.add(sequence, self._due_order(sequence), work)
            self._rank(sequence)

    def _advance(self, sequence: Sequence) -> None:
        """It had a turn after which it is to be ranked anew."""
        standing: Standing = sequence.standing
        sequence_id = sequence.sequence_id
        if sequence_id not in self._streams:
            if not standing.has_begun:
                standing.has_begun = True
                self._backlog.begin(standing.work_seconds)
                self._waiting.begin(sequence)
            if sequence.num_completion_tokens:
                self._forget_waiting(sequence)
                self._streams[sequence_id] = sequence
        self._rank(sequence)

    def _forget_waiting(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._short.get(sequence.class_index, {}).pop(sequence.sequence_id, None)
        self._lane.pop(sequence.sequence_id, None)

    def _due_order(self, sequence: Sequence) -> float:
        """Its arrival, and earlier if its completion may take long."""
        tokens = self._work.lengths(sequence).quantile_left(0, _LONG_QUANTILE)
        tokens = min(tokens, self._long_tokens, self._work.most_left(sequence))
        return sequence.arrival_seconds - tokens * self._step_seconds

    @property
    def _long_tokens(self) -> float:
        return self._work.all_lengths.quantile_left(0, _LONG_QUANTILE)

    def _find_due(self, now: float) -> None:
        longest = self.longest_wait_seconds(now)
        due = self._waiting.find(
            now,
            allowed_seconds=longest + self._long_tokens * self._step_seconds,
            most_seconds=_GRACE * longest,
            seconds_per_work=self._backlog.seconds_per_work,
        )
        before, self._due = self._due, due
        for sequence_id in before.keys() ^ due.keys():
            sequence = due.get(sequence_id) or before[sequence_id]
            if sequence.standing is not None:
                self._rank(sequence)

    def _fill_lane(self) -> None:
        """Let short ones on the lane, but none past somebody who is due: those of a worse class are behind
        them anyway."""
        if not any(self._short.values()):
            return
        best_due = min((sequence.class_index for sequence in self._due.values()), default=math.inf)
        for class_index in sorted(self._short):
            short = self._short[class_index]
            while short and class_index < best_due and len(self._lane) < self._lane_size:
                sequence_id = next(iter(short))
                sequence = self._lane[sequence_id] = short.pop(sequence_id)
                self._rank(sequence)

    def _follow(self, wait: float, now: float) -> bool:
        """Let the scale follow the load. Whether it has changed."""
        elapsed = 0.0 if self._wait_seconds is None else max(now - self._wait_seconds, 0.0)
        self._wait_seconds = now
        self._wait += (wait - self._wait) * -math.expm1(-elapsed / _SMOOTHING_SECONDS)
        scale = min(max(self._strength * self._wait, self._least_scale), self._most_scale)
        index = math.log(scale) / math.log(_SCALE_STEP)
        if abs(index - self._scale_index) <= 0.75:  # not to and fro at a bound
            return False
        self._scale_index = round(index)
        return True

    def _rank(self, sequence: Sequence) -> None:
        work, scale = self._work, self.scale_seconds
        produced = sequence.num_completion_tokens
        known = work.prefill_seconds(sequence) + work.inherited_seconds(sequence)
        price = work.token_seconds(sequence) / scale
        moment = work.lengths(sequence).log_moment(produced, price)
        exponent = known / scale + min(moment, price * work.most_left(sequence))
        boost = min(-math.log(-math.expm1(-max(exponent, 1e-9))), self._most_boost) * scale
        place = self._place(sequence)
        key = self._waiting.order(sequence) if place == _DUE else sequence.arrival_seconds - boost
        sequence.rank = (place, key, sequence.sequence_id)
        sequence.standing.next_mark = next_mark(produced) if produced else 0

    def _place(self, sequence: Sequence) -> int:
        sequence_id = sequence.sequence_id
        if sequence_id in self._streams:
            return _RUNNING
        if sequence_id in self._due:
            return _DUE
        return _EXPRESS if sequence_id in self._lane else _NORMAL
