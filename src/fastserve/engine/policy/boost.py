"""`boost`: in order of arrival, brought forward by how little work is expected.

After Yu and Scully, "Strongly Tail-Optimal Scheduling in the Light-Tailed M/G/1" (SIGMETRICS 2024).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice

from fastserve.engine.length import next_mark
from fastserve.engine.policy.policy import RankedPolicy
from fastserve.engine.policy.work import ExpectedWork
from fastserve.engine.sequence import Sequence
from fastserve.errors import OptionError

_SCALE_STEP = 1.25  # scales within such a factor count as equal: ranks change together, and seldom
_SMOOTHING_SECONDS = 5.0  # of the wait that the scale follows
_CHECK_SECONDS = 0.1  # between two looks for those that are due
_LEAST_PATIENCE_SECONDS = 10.0  # before which nobody is due
_PEAK_SECONDS = 600.0  # after which a peak of the wait counts for a third
_DURATIONS = 256  # of the newest completions, from their first turn to their end
_LONG_SHARE = 0.95  # of them that are shorter than a long one
_STEP_MEMORY = 0.002  # weight of a turn in the mean seconds of a step
_LANE_SHARE = 1 / 8  # of a step's sequences, that may come by the express lane
_MOST_LOOKED_AT = 32  # of those that wait, for the lane
_DUE, _EXPRESS, _NORMAL = range(3)  # first part of a rank


@dataclass(slots=True)
class Standing:
    """What the policy remembers of a sequence."""

    work_seconds: float  # expected when it came
    expected_seconds: float  # from its first turn to its end
    next_mark: int = 0  # tokens of the completion at which it is ranked again
    begun_seconds: float | None = None  # when it had its first turn


class FcfsQueue:
    """How long whoever is next would have waited by now, were all served in the order in which they came.

    As much work as has been begun would have been begun in that order: so the next is the first one whose
    work, with that of all who came before, is more than what has been begun.
    """

    def __init__(self) -> None:
        # By sequence_id: work and arrival of those whose turn would not have come.
        self._waiting: OrderedDict[int, tuple[float, float]] = OrderedDict()
        self._begun = 0.0  # work, less that of those whose turn would have come
        self._peak = 0.0  # as of the time below
        self._peak_seconds = -math.inf

    def arrive(self, sequence_id: int, work_seconds: float, arrival_seconds: float) -> None:
        self._waiting[sequence_id] = work_seconds, arrival_seconds

    def begin(self, work_seconds: float) -> None:
        """Somebody's work has been begun."""
        self._begun += work_seconds

    def leave(self, sequence_id: int, work_seconds: float) -> None:
        """Somebody is gone without a turn; where it counts as begun, another one is in its place."""
        if self._waiting.pop(sequence_id, None) is None:
            self._begun += work_seconds

    def wait_seconds(self, now: float) -> float:
        waiting = self._waiting
        while waiting and (first := next(iter(waiting.values())))[0] <= self._begun + 1e-9:
            self._begun -= first[0]
            waiting.popitem(last=False)
        if not waiting:
            self._begun = 0.0
            return 0.0
        wait = max(now - first[1], 0.0)
        self._peak, self._peak_seconds = max(self.peak_seconds(now), wait), now
        return wait

    def peak_seconds(self, now: float) -> float:
        """The longest wait of late; an older one counts for less."""
        return self._peak * math.exp(min(self._peak_seconds - now, 0.0) / _PEAK_SECONDS)


class Durations:
    """How long completions take from their first turn to their end."""

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=_DURATIONS)
        self._num_new = 0
        self.long_seconds = 0.0

    def add(self, seconds: float) -> None:
        self._newest.append(seconds)
        self._num_new += 1
        if self._num_new >= len(self._newest) / 8:
            self._num_new = 0
            self.long_seconds = sorted(self._newest)[int(_LONG_SHARE * len(self._newest))]


class Boost(RankedPolicy):
    """A sequence's key is its arrival less its boost, -t ln(1 - 1 / E[exp(W / t)]): about t ln(t / W) where
    its expected work W is less than the scale t, nothing where it is more. The lower key goes first.

    A scale near 0 is first come, first served; a large one is shortest expected work first. It follows the
    load: `strength` times what a newcomer would wait for if all were served as they came, so that hardly
    anybody is overtaken while nobody waits, and a backlog is worked off in the order of work.

    Whoever has waited for its first token for much longer than anybody would have lately in that order is
    due, and goes first: `patience` times that wait, and longer if its completion, with that, still ends
    before a long one would. Besides, a boost is at most `most_boost` scales, and a scale at most
    `most_scale_seconds` (and a fifth, as scales are rounded): by its key, nobody is overtaken by a sequence
    that came later by more than their product.

    Work is that of the prompt and of the tokens to be expected, given how many there are; it is looked at
    again when a completion has grown by a third. A stream that was passed over for `pause_seconds` goes first
    once.

    A prompt that takes less than `express_seconds` is read at once, by an express lane that an eighth of a
    step's sequences may have come by: its first token waits for nobody but those that are due, and costs the
    others hardly anything.

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
        strength: float = 2.0,
        patience: float = 1.3,
        least_scale_seconds: float = 2.0,
        most_scale_seconds: float = 300.0,
        most_boost: float = 12.0,
        pause_seconds: float = 1.0,
        express_seconds: float = 0.05,
        margin: float = 2.0,
    ) -> None:
        self._work = work
        self._lane_size = max(int(_LANE_SHARE * max_sequences), 1)
        self._express_seconds = express_seconds
        self._lane: set[int] = set()  # sequence_ids of those that came by it and are not finished
        if least_scale_seconds > most_scale_seconds:
            raise OptionError(
                f"boost: least_scale_seconds={least_scale_seconds:g} is more than "
                f"most_scale_seconds={most_scale_seconds:g}",
                hint="raise the one or lower the other",
            )
        self._strength = strength
        self._patience = patience
        self._least_scale = least_scale_seconds
        self._most_scale = most_scale_seconds
        self._most_boost = most_boost
        self._pause_seconds = pause_seconds
        self._margin = margin
        # Who has no token yet, by sequence_id, in order of arrival.
        self._unserved: OrderedDict[int, Sequence] = OrderedDict()
        # Who has tokens, by sequence_id, with the time of the last turn; the least recent first.
        self._last_turn: OrderedDict[int, tuple[Sequence, float]] = OrderedDict()
        self._fcfs = FcfsQueue()
        self._durations = Durations()
        self._next_check = -math.inf  # for those that are due
        self._step_seconds = 0.0  # mean over turns
        self._wait = 0.0  # smoothed
        self._wait_seconds: float | None = None  # when it was looked at
        self._scale_index = round(math.log(least_scale_seconds) / math.log(_SCALE_STEP))

    @property
    def scale_seconds(self) -> float:
        """t."""
        return _SCALE_STEP**self._scale_index

    def enter(self, sequence: Sequence, now: float) -> None:
        self._work.enter(sequence)
        tokens = self._work.lengths(sequence).mean_left(sequence.num_completion_tokens)
        tokens = min(tokens, self._work.most_left(sequence))
        sequence.standing = Standing(self._work.seconds(sequence), tokens * self._step_seconds)
        if not sequence.is_started:
            self._unserved[sequence.sequence_id] = sequence
            work = sequence.standing.work_seconds
            self._fcfs.arrive(sequence.sequence_id, work, sequence.arrival_seconds)
        elif sequence.num_completion_tokens:
            self._last_turn[sequence.sequence_id] = sequence, now
        self._rank(sequence)
        if not sequence.is_started and len(self._lane) < self._lane_size:
            self._take_lane(sequence)

    def leave(self, sequence: Sequence) -> None:
        is_unserved = self._unserved.pop(sequence.sequence_id, None) is not None
        if is_unserved and not sequence.is_started:
            self._fcfs.leave(sequence.sequence_id, sequence.standing.work_seconds)
        self._lane.discard(sequence.sequence_id)
        last = self._last_turn.pop(sequence.sequence_id, None)
        if sequence.is_complete and last is not None and sequence.standing.begun_seconds is not None:
            self._durations.add(last[1] - sequence.standing.begun_seconds)
        self._work.leave(sequence)
        super().leave(sequence)

    def serve(self, sequence: Sequence, seconds: float, now: float) -> None:
        sequence_id = sequence.sequence_id
        self._step_seconds += (seconds - self._step_seconds) * (_STEP_MEMORY if self._step_seconds else 1.0)
        if sequence_id in self._unserved and sequence.standing.begun_seconds is None:
            sequence.standing.begun_seconds = now
            self._fcfs.begin(sequence.standing.work_seconds)
        produced = sequence.num_completion_tokens
        if produced:
            self._unserved.pop(sequence_id, None)
        goes_first = sequence.rank[0] != _NORMAL
        if produced:
            self._last_turn[sequence_id] = sequence, now
            self._last_turn.move_to_end(sequence_id)
            if goes_first or produced >= sequence.standing.next_mark:
                self._rank(sequence)
        elif not goes_first:
            self._rank(sequence)

    def refresh(self, sequences: Seq[Sequence], now: float) -> None:
        if self._follow(self._fcfs.wait_seconds(now), now):
            for sequence in sequences:
                if sequence.rank[0] == _NORMAL:
                    self._rank(sequence)
        if now >= self._next_check or now < self._next_check - _CHECK_SECONDS:
            self._next_check = now + _CHECK_SECONDS
            self._find_due(now)
            self._fill_lane()
        for sequence, last_turn in self._last_turn.values():
            if now - last_turn < self._pause_seconds:
                break
            if sequence.is_resident:
                sequence.rank = (_DUE, sequence.arrival_seconds, sequence.sequence_id)

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        if better.rank[0] != _NORMAL or resident.rank[0] != _NORMAL:
            return False
        return bool(better.rank[1] + self._margin * self.scale_seconds < resident.rank[1])

    def _find_due(self, now: float) -> None:
        """Those that wait for longer than anybody has to; a long completion has less time for that."""
        longest = self._patience * self._fcfs.peak_seconds(now) + self._durations.long_seconds
        for sequence in self._unserved.values():
            age = now - sequence.arrival_seconds
            if age < _LEAST_PATIENCE_SECONDS:
                break
            if age > longest - sequence.standing.expected_seconds:
                sequence.rank = (_DUE, sequence.arrival_seconds, sequence.sequence_id)

    def _fill_lane(self) -> None:
        for sequence in islice(self._unserved.values(), _MOST_LOOKED_AT):
            if len(self._lane) == self._lane_size:
                return
            self._take_lane(sequence)

    def _take_lane(self, sequence: Sequence) -> None:
        """By the express lane, if its prompt takes so little."""
        is_short = self._work.prefill_seconds(sequence) < self._express_seconds
        if is_short and sequence.sequence_id not in self._lane and not sequence.inherited_seconds:
            self._lane.add(sequence.sequence_id)
            sequence.rank = (_EXPRESS, sequence.arrival_seconds, sequence.sequence_id)

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
        sequence.rank = (_NORMAL, sequence.arrival_seconds - boost, sequence.sequence_id)
        sequence.standing.next_mark = next_mark(produced)
