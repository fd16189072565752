"""A second, smaller model of the same vocabulary, that guesses how the texts of the first go on.

Of each sequence that it is asked about it keeps a shadow: a sequence of its own, whose tokens are those of
the text and then its guesses, with keys and values in a pool of its own. A shadow reads what is new before it
writes on; where a guess was wrong it is taken back to what was right. Guesses are drawn with the request's
own parameters and random numbers, so that two models of like mind draw the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from fastserve.engine.batch import build_batch
from fastserve.engine.block import BlockPool
from fastserve.engine.cost import OnlineStepCost, StepCost
from fastserve.engine.residency import Residency
from fastserve.engine.sequence import Residence, Sequence
from fastserve.engine.turn import Turn, total_work
from fastserve.types import Batch, Executable, StepResult

# As long as no step has run.
_INITIAL_COST = StepCost(
    fixed_seconds=0.002, prefill_seconds=0.0001, decode_seconds=0.0001, draft_seconds=0.0001
)


@dataclass(frozen=True, slots=True)
class Observation:
    """A guess whose token has come."""

    sequence_id: int
    match_length: int  # guesses before it, one after the other, that were right
    is_right: bool


@dataclass(slots=True)
class _Shadow:
    """What the model has read of a sequence, and written on it."""

    source: Sequence
    own: Sequence  # its tokens: the source's, as far as they were there when it was followed; then guesses
    num_agreed: int  # of its tokens, the first ones, which are the source's
    match_length: int = 0  # guesses up to there, one after the other, that were right

    @property
    def num_ahead(self) -> int:
        """Guesses beyond the source's end."""
        return len(self.own.token_ids) - len(self.source.token_ids)


class DraftModel:
    """Guesses at the next tokens of several sequences at once, in steps of its own. One is run when it is
    made, so that its weights are in memory, and every step that counts says what steps take.

    Args:
        executable: of the same vocabulary as the model whose texts are guessed at.
        clock: seconds, monotonic.
    """

    def __init__(self, executable: Executable, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._executable = executable
        self._clock = clock
        self.limits = executable.limits
        self.cost = OnlineStepCost(_INITIAL_COST)  # of its steps
        self.pool = BlockPool(num_blocks=self.limits.num_blocks, block_size=executable.block_size)
        self._residency = Residency(self.pool, cost=self.cost)
        self._shadows: dict[int, _Shadow] = {}  # by sequence_id, that used last at the end
        self._observations: list[Observation] = []
        self.seconds = 0.0  # of all its steps
        executable.run(_make_first_batch(executable.vocab_size))

    def take_observations(self) -> list[Observation]:
        """Of the guesses whose tokens have come since the last call."""
        taken, self._observations = self._observations, []
        return taken

    def match_length(self, sequence: Sequence) -> int:
        """Guesses up to the end of its text, one after the other, that were right."""
        shadow = self._shadows.get(sequence.sequence_id)
        return shadow.match_length if shadow else 0

    def num_unread(self, sequence: Sequence) -> int:
        """Tokens of its text that are to be computed before there is a new guess: at least one."""
        shadow = self._shadows.get(sequence.sequence_id)
        num_read = shadow.own.num_computed_tokens if shadow else 0
        return max(len(sequence.token_ids) - num_read, 1)

    def follow(self, sequence: Sequence) -> None:
        """Compare what was guessed with what has come, and take back what was wrong. Nothing happens where
        the sequence has no shadow."""
        shadow = self._shadows.get(sequence.sequence_id)
        if shadow is None:
            return
        own, text = shadow.own, sequence.token_ids
        position, end = shadow.num_agreed, min(len(own.token_ids), len(text))
        while position < end:
            is_right = own.token_ids[position] == text[position]
            self._observe(shadow, is_right=is_right)
            if not is_right:
                break
            position += 1
        if position < len(text):  # else all guesses hold as yet, those beyond its end too
            own.token_ids[position:] = text[position:]
            own.num_computed_tokens = min(own.num_computed_tokens, position)
        shadow.num_agreed = len(text)
        if own.num_computed_tokens <= len(text):
            self._residency.register(own)

    def read(self, sequences: Seq[Sequence], num_tokens: int) -> None:
        """Read on in these texts, one after the other, so many tokens in all: one step. What is known of a
        completion is guessed at on the way, so that there is something to observe."""
        shadows = [self._open(sequence) for sequence in sequences]
        for sequence in sequences:
            self.follow(sequence)
        self._step(shadows, min(num_tokens, self.limits.max_tokens))

    def guess(self, wanted: Seq[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """The next tokens of each sequence, at most so many. Fewer, or none, where its pool, its context or
        its numbers come to an end."""
        shadows = [self._open(sequence) for sequence, _ in wanted]
        for sequence, _ in wanted:
            self.follow(sequence)
        lengths = [
            min(length, self.limits.max_context - len(sequence.token_ids)) for sequence, length in wanted
        ]
        unfinished = list(zip(shadows, lengths, strict=True))
        while unfinished := [(shadow, length) for shadow, length in unfinished if shadow.num_ahead < length]:
            stopped = self._step([shadow for shadow, _ in unfinished], self.limits.max_tokens)
            unfinished = [entry for entry in unfinished if entry[0].own.sequence_id not in stopped]
        return [
            tuple(shadow.own.token_ids[len(shadow.source.token_ids) :][: max(length, 0)])
            for shadow, length in zip(shadows, lengths, strict=True)
        ]

    def release(self, sequence_id: int) -> None:
        """Free what is kept of a sequence."""
        shadow = self._shadows.pop(sequence_id, None)
        if shadow is not None:
            self._residency.release(shadow.own)

    def release_absent(self) -> None:
        """Free what is kept of sequences that have lost their own blocks."""
        absent = [i for i, shadow in self._shadows.items() if shadow.source.residence is not Residence.FAST]
        for sequence_id in absent:
            self.release(sequence_id)

    def check_invariants(self) -> None:
        """Assert that every block is free or owned by a shadow, and that shadows are within their limits."""
        self._residency.check_invariants([shadow.own for shadow in self._shadows.values()])
        for shadow in self._shadows.values():
            own = shadow.own
            assert shadow.source.residence is not Residence.FINISHED
            assert own.num_computed_tokens <= self.limits.max_context
            assert own.num_computed_tokens < len(own.token_ids)
            assert own.token_ids[: shadow.num_agreed] == shadow.source.token_ids[: shadow.num_agreed]

    def _open(self, sequence: Sequence) -> _Shadow:
        """The shadow of a sequence, which is a new one where it has none."""
        shadow = self._shadows.pop(sequence.sequence_id, None)
        if shadow is None:
            own = Sequence(
                sequence_id=sequence.sequence_id,
                token_ids=list(sequence.token_ids),
                num_prompt_tokens=sequence.num_prompt_tokens,
                max_tokens=sequence.max_tokens,
                arrival_seconds=sequence.arrival_seconds,
                params=replace(sequence.params, logprobs=None, prompt_logprobs=None),
                seed=sequence.seed,
                scope=sequence.scope,
            )
            shadow = _Shadow(sequence, own, num_agreed=len(own.token_ids))
        self._shadows[sequence.sequence_id] = shadow
        return shadow

    def _step(self, shadows: Seq[_Shadow], num_tokens: int) -> set[int]:
        """Go on with these shadows in one step of so many rows: read, and at the end of what is known, guess.
        Returns the ids of sequences with which it cannot go on."""
        busy = {shadow.own.sequence_id for shadow in shadows}
        turns: list[Turn] = []
        stopped: set[int] = set()
        num_outputs = self.limits.max_outputs
        shadows = shadows[: min(self.limits.max_sequences, num_outputs, num_tokens)]
        for num_left in range(len(shadows), 0, -1):
            shadow = shadows[-num_left]
            most = num_tokens - num_left + 1  # a row is left to each of the others, and an output row
            if not self._make_room(shadow.own, most, busy):
                stopped.add(shadow.own.sequence_id)
                continue
            turn = _make_turn(shadow.own, most, num_outputs - num_left + 1)
            turns.append(turn)
            num_tokens -= turn.num_rows
            num_outputs -= turn.num_outputs
        if turns:
            result = self._run(turns)
            row = 0
            for turn in turns:
                if not self._take(self._shadows[turn.sequence.sequence_id], turn, result, row):
                    stopped.add(turn.sequence.sequence_id)
                row += turn.num_outputs
        return stopped

    def _make_room(self, own: Sequence, num_tokens: int, busy: Collection[int]) -> bool:
        """Give a shadow the blocks of its next tokens, those of the shadows that were used longest ago where
        there are none left."""
        if len(own.token_ids) > self.limits.max_context:
            return False
        is_new = own.residence is Residence.NOWHERE
        num_tokens = min(num_tokens, own.num_uncomputed_tokens)
        while (
            self._residency.blocks_to_enter(own)
            if is_new
            else self._residency.blocks_to_grow(own, num_tokens)
        ) > self.pool.num_free:
            victim = next((sequence_id for sequence_id in self._shadows if sequence_id not in busy), None)
            if victim is None:
                return False
            self.release(victim)
        if is_new:
            self._residency.enter(own)
        else:
            self._residency.grow(own, num_tokens)
        return True

    def _run(self, turns: Seq[Turn]) -> StepResult:
        """Run a step. Drafts of its turns are tokens that the shadows have already."""
        token_ids = [turn.sequence.token_ids for turn in turns]
        for turn in turns:
            if turn.drafts:
                end = turn.sequence.num_computed_tokens + turn.num_tokens
                turn.sequence.token_ids = turn.sequence.token_ids[:end]
        start = self._clock()
        try:
            result = self._executable.run(build_batch(turns, vocab_size=self._executable.vocab_size))
        finally:
            for turn, ids in zip(turns, token_ids, strict=True):
                turn.sequence.token_ids = ids
        seconds = self._clock() - start
        self.seconds += seconds
        self.cost.observe(total_work(turns), seconds)
        return result

    def _take(self, shadow: _Shadow, turn: Turn, result: StepResult, row: int) -> bool:
        """The tokens of a turn are computed, and its outputs begin at this row of the result: guesses at
        tokens that have come are compared with them, the one beyond is appended. Whether it is a token."""
        own = shadow.own
        first = own.num_computed_tokens + turn.num_tokens  # the token that the first output guesses at
        own.num_computed_tokens += turn.num_rows
        if turn.num_tokens > 1:
            shadow.match_length = 0  # of the tokens before, nothing was said
        assert result.token_ids is not None
        assert result.is_valid is not None
        for index in range(turn.num_outputs):
            token_id = int(result.token_ids[row + index])
            position = first + index
            if position < len(own.token_ids):
                self._observe(shadow, is_right=token_id == own.token_ids[position])
            elif result.is_valid[row + index]:
                own.token_ids.append(token_id)
            else:
                return False
        return True

    def _observe(self, shadow: _Shadow, *, is_right: bool) -> None:
        self._observations.append(Observation(shadow.own.sequence_id, shadow.match_length, is_right))
        shadow.match_length = shadow.match_length + 1 if is_right else 0


def _make_first_batch(vocab_size: int) -> Batch:
    """One token, in a block that nobody owns yet."""
    own = Sequence(
        sequence_id=0,
        token_ids=[0],
        num_prompt_tokens=1,
        max_tokens=1,
        arrival_seconds=0.0,
        block_table=[0],
    )
    return build_batch([Turn(own, 1, (own,))], vocab_size=vocab_size)


def _make_turn(own: Sequence, num_tokens: int, num_outputs: int) -> Turn:
    """A shadow's next tokens, at most so many. Those with an output say what they would have guessed: of its
    completion, the last ones."""
    start = own.num_computed_tokens
    end = min(start + num_tokens, len(own.token_ids))
    first = max(start, own.num_prompt_tokens - 1, end - num_outputs)  # that has an output
    if first >= end:
        return Turn(own, end - start, ())
    return Turn(own, first + 1 - start, (own,), drafts=own.token_ids[first + 1 : end])
