"""One step's turns: who runs, with how many tokens, and who has memory for it.

Turns go down the ranks: decodes get their row, prompts get chunks as far as the pace allows, whoever has no
blocks is let in while there are some. Memory is taken from the other end: where a sequence that runs needs
another block, or for a better one that waits, if the guard allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.engine.adapter_slots import AdapterSlots
from fastserve.engine.cost import StepWork
from fastserve.engine.guard import Guard
from fastserve.engine.pace import Pace, PrefillBudget
from fastserve.engine.peak import Peak, PeakForecast
from fastserve.engine.policy.policy import Policy
from fastserve.engine.residency import Residency
from fastserve.engine.sequence import Residence, Sequence
from fastserve.types import Limits

RESERVED_BLOCKS = 2  # free blocks for each sequence with a turn, that newcomers and guesses leave
_NUM_CONSIDERED = 32  # residents, the farthest from their turn, that may be displaced in one step
_NUM_AHEAD = 8  # ranks beyond those with a turn whose sequences are brought back from the slow tier in time


@dataclass(frozen=True, slots=True)
class Turn:
    """A sequence's share of one step: its next `num_tokens` uncomputed tokens, and drafts, which are guesses
    at those that follow: each has an output row too, which says what comes after it."""

    sequence: Sequence
    num_tokens: int
    outputs: Seq[Sequence]  # whose next token the step gives: with its last token, it and its forks
    copy: tuple[int, int] | None = None  # blocks (source, target) to copy before the step
    drafts: Seq[int] = ()  # token ids; of a sequence that decodes, and has no forks
    num_scored: int = (
        0  # tokens of the prompt whose logprobs the step gives too, by outputs before all others
    )

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.drafts)

    @property
    def scored_indices(self) -> range:
        """Of the tokens of the prompt that are scored, before the turn is committed."""
        first = max(self.sequence.num_computed_tokens + 1, self.sequence.num_scored_tokens)
        return range(first, first + self.num_scored)

    @property
    def num_outputs(self) -> int:
        """Output rows."""
        return self.num_scored + len(self.outputs) + len(self.drafts)


def total_work(turns: Seq[Turn]) -> StepWork:
    """What the turns of a step add up to, before they are computed."""
    prefill = decode = attended = draft = prefill_attended = 0
    for turn in turns:
        start, num_tokens = turn.sequence.num_computed_tokens, turn.num_tokens
        draft += len(turn.drafts)
        if num_tokens == 1 and turn.outputs:
            decode += 1
            attended += start + 1
        else:
            prefill += num_tokens
            prefill_attended += num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return StepWork(prefill, decode, attended, draft, prefill_attended)


class Round:
    """The making of one step's turns. Used once."""

    def __init__(
        self,
        residency: Residency,
        *,
        policy: Policy,
        guard: Guard,
        pace: Pace,
        forecast: PeakForecast | None,
        limits: Limits,
        prefill_chunk_tokens: int,
        now: float,
        adapter_slots: AdapterSlots,
    ) -> None:
        self._residency = residency
        self._adapter_slots = adapter_slots
        self._pool = residency.pool
        self._policy = policy
        self._guard = guard
        self._pace = pace
        self._forecast = forecast
        self._peak: Peak | None = None  # of the residents, from when it is first asked for
        self._now = now
        # One token and one output row each: every sequence with a turn can decode.
        self._max_turns = min(limits.max_sequences, limits.max_outputs, limits.max_tokens)
        self._outputs_left = limits.max_outputs
        self._scores_left = 0
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._turns: list[Turn] = []
        self._has_turn: set[int] = set()  # sequence_ids
        self.evicted_for: dict[int, int | None] = {}  # sequence_ids: for whom; None: for nobody in particular
        self._waits_for_slot = False  # somebody does, whose adapter has none
        self._is_blocked = False  # somebody waits for memory: nobody behind is let in to take it
        self._order: Seq[Sequence] = ()
        self._departures: list[Sequence] | None = None  # residents, the first to give up memory last
        self._places: dict[int, int] | None = None  # in the order, by sequence_id

    def make_turns(self, order: Seq[Sequence]) -> list[Turn]:
        """The turns of sequences in the order of their ranks."""
        self._order = order
        self._prefill = self._prefill_budget()
        num_seen = 0
        for sequence in order:
            if len(self._turns) == self._max_turns:
                break
            num_seen += 1
            if sequence.is_held:
                continue
            if sequence.residence is Residence.FAST:
                self._give_turn(sequence, is_new=False)
            elif not self._is_blocked and self._may_enter(sequence):
                if not self._adapter_slots.has_room_for(sequence.adapter):
                    self._wait_for_slot(sequence)
                    continue
                self._is_blocked = not self._admit(sequence)
                if sequence.is_resident:
                    self._give_turn(sequence, is_new=True)
        if not self._is_blocked:
            self._bring_back(order[num_seen : num_seen + _NUM_AHEAD])
        self._send_away()
        return self._turns

    def _prefill_budget(self) -> PrefillBudget:
        """For prompts of this step, beside the sequences that will decode in it."""
        num_decodes = attended = backlog = longest = 0
        slack = math.inf
        for sequence in self._order:
            if sequence.is_held:
                continue
            uncomputed = len(sequence.token_ids) - sequence.num_computed_tokens
            if uncomputed > 1 or sequence.is_read_only:
                backlog += uncomputed
                longest = max(longest, uncomputed)
            elif sequence.residence is Residence.FAST and num_decodes < self._max_turns:
                num_decodes += 1
                attended += sequence.num_computed_tokens
                slack = min(slack, sequence.slack_seconds)
        self._scores_left = max(self._outputs_left - num_decodes - 1, 1)
        decodes = StepWork(0, num_decodes, attended)
        slack = slack if num_decodes else 0.0
        return self._pace.prefill_budget(decodes, backlog, longest_tokens=longest, slack_seconds=slack)

    def _give_turn(self, sequence: Sequence, *, is_new: bool) -> None:
        """A turn of a resident, if there are rows and memory for it. Those that decode have their rows
        already."""
        num_tokens = sequence.num_uncomputed_tokens
        takes_prefill_tokens = is_new or num_tokens > 1
        if sequence.is_source_unread:
            num_tokens = sequence.target_start
            num_tokens *= self._prefill.fits_whole(num_tokens)
        elif takes_prefill_tokens:
            num_tokens = min(num_tokens, self._prefill_chunk_tokens)
            num_tokens = self._prefill.fit(num_tokens, sequence.num_computed_tokens)
        num_scored = 0
        if sequence.is_to_be_scored:
            num_tokens, num_scored = self._fit_scores(sequence, num_tokens)
        outputs: Seq[Sequence] = ()
        if num_tokens == sequence.num_uncomputed_tokens and not sequence.is_read_only:
            outputs = (sequence, *sequence.forks)
        if num_scored and num_scored + len(outputs) > self._outputs_left:
            num_tokens, outputs = num_tokens - 1, ()  # its last token has a step of its own
        if num_tokens == 0 or num_scored + len(outputs) > self._outputs_left:
            return
        copy = None
        if num_tokens > 1 or not self._residency.has_slot(sequence):
            if not self._make_room_to_grow(sequence, num_tokens):
                self._is_blocked = True
                return
            copy = self._residency.grow(sequence, num_tokens)
        if takes_prefill_tokens:
            self._prefill.spend(num_tokens, sequence.num_computed_tokens)
        self._outputs_left -= num_scored + len(outputs)
        self._scores_left -= num_scored
        self._turns.append(Turn(sequence, num_tokens, outputs, copy, num_scored=num_scored))
        self._has_turn.add(sequence.sequence_id)

    def _fit_scores(self, sequence: Sequence, num_tokens: int) -> tuple[int, int]:
        """How many of its next tokens have output rows for their logprobs, and how many rows that are: token
        p + 1 is scored by the row of token p."""
        start = sequence.num_computed_tokens
        first = max(start, sequence.num_scored_tokens - 1)  # of the rows that score
        num_tokens = min(num_tokens, first - start + min(self._scores_left, self._outputs_left))
        last = min(start + num_tokens, sequence.num_prompt_tokens - 1)
        return num_tokens, max(last - first, 0)

    def _make_room_to_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the pool has the blocks that its next tokens need: those who come last give up theirs."""
        while (needed := self._residency.blocks_to_grow(sequence, num_tokens)) > self._pool.num_free:
            if needed <= self._pool.num_free + self._residency.num_leaving:
                return False  # soon
            victim = self._next_departure(after=sequence)
            self._evict(victim or sequence, sequence)
            if victim is None:
                return False
        return True

    def _may_enter(self, sequence: Sequence) -> bool:
        if sequence.residence is Residence.NOWHERE:
            return not self._prefill.is_spent
        return sequence.residence is Residence.SLOW

    def _admit(self, sequence: Sequence) -> bool:
        """Let a sequence into the fast pool, in place of others where it is worth that. Whether it is in, or
        on the way."""
        needed = self._residency.blocks_to_enter(sequence) + self._reserve
        if needed > self._pool.num_free:
            if needed <= self._pool.num_free + self._residency.num_leaving:
                return False  # soon
            self._displace(sequence, needed)
            # What it shared may be nobody's now.
            needed = self._residency.blocks_to_enter(sequence) + self._reserve
            self._peak = None
        elif not self._will_fit(sequence, needed - self._reserve):
            self._take_from_held(sequence, needed - self._reserve)
            return False
        if needed > self._pool.num_free:
            return False
        self._residency.enter(sequence)
        self._adapter_slots.use(sequence.adapter)
        return True

    def _wait_for_slot(self, newcomer: Sequence) -> None:
        """The first to wait for a slot for its adapter gets one of those who take no tokens, before the next
        step: they give up their blocks."""
        if self._waits_for_slot:
            return
        self._waits_for_slot = True
        for held in self._adapter_slots.held_users(self._order):
            self._evict(held, newcomer)
            self._peak = self._departures = None

    def _will_fit(self, sequence: Sequence, num_blocks: int) -> bool:
        """Whether the pool will hold what residents are expected to grow to, with one more that has so many
        blocks at first. Where nobody else is, it is let in in any case."""
        if self._forecast is None:
            return True
        if self._peak is None:
            self._peak = self._forecast.peak_of(self._order)
        if self._peak is None:
            return True
        tokens_left = self._forecast.expect(sequence)
        is_alone = not self._peak.num_added
        if not is_alone and self._peak.num_blocks_with(tokens_left, num_blocks) > self._pool.num_blocks:
            return False
        self._peak.add(tokens_left, num_blocks)
        return True

    def _take_from_held(self, newcomer: Sequence, num_blocks: int) -> None:
        """Who takes no tokens gives up its blocks for one who would, before the next step: if those of all of
        them are enough."""
        assert self._forecast is not None
        assert self._peak is not None
        held = next((resident for resident in reversed(self._residents()) if resident.is_held), None)
        peak = self._peak.num_blocks_with(self._forecast.expect(newcomer), num_blocks)
        if held is not None and peak - self._peak.num_lasting <= self._pool.num_blocks:
            self._evict(held, newcomer)
            self._residents().remove(held)
            self._peak = None

    @property
    def _reserve(self) -> int:
        """Free blocks that are left to the sequences that run, so that the next steps evict nobody."""
        return RESERVED_BLOCKS * len(self._turns)

    def _displace(self, better: Sequence, needed: int) -> None:
        """Evict sequences that a better one outranks, if they have what it needs."""
        free = self._pool.num_free + self._residency.num_leaving
        victims: list[tuple[Sequence, float]] = []
        held = [resident for resident in reversed(self._residents()) if resident.is_held]
        others = [r for r in self._residents()[: -1 - _NUM_CONSIDERED : -1] if not r.is_held]
        for victim in (*held, *others):
            if free >= needed:
                break
            if victim.sequence_id in self._has_turn:
                continue
            if not victim.is_held and not (
                self._policy.outranks(better, victim) and self._has_gained(victim)
            ):
                continue
            seconds = self._residency.eviction_seconds(victim)
            is_guarded = self._policy.is_guarded and not victim.is_held
            if is_guarded and not self._guard.allows(victim, seconds, self._now):
                continue
            victims.append((victim, seconds))
            free += self._residency.num_own_blocks(victim)
        if free < needed:
            return
        for victim, seconds in victims:
            self._guard.spend(seconds)
            self._residents().remove(victim)
            self._evict(victim, better)

    def _has_gained(self, resident: Sequence) -> bool:
        """Whether its stay has brought a token: where no guard prices evictions, those who lose what they
        have computed anew before it does would displace each other for ever."""
        is_dropped_again = resident.num_evictions > 0 and not self._residency.is_cheaper_to_move(resident)
        has_grown = len(resident.token_ids) > resident.num_entry_tokens
        return self._policy.is_guarded or not is_dropped_again or has_grown

    def _is_behind(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether it comes after another in the order, which is more than the policy's ranks."""
        if self._places is None:
            self._places = {s.sequence_id: place for place, s in enumerate(self._order)}
        return self._places[sequence.sequence_id] > self._places[other.sequence_id]

    def _bring_back(self, order: Iterable[Sequence]) -> None:
        """Let sequences of the slow tier, whose turn is near, arrive before it comes."""
        for sequence in order:
            if sequence.residence is Residence.SLOW and not sequence.is_held:
                needed = self._residency.blocks_to_enter(sequence)
                if not self._adapter_slots.has_room_for(sequence.adapter):
                    continue
                if needed + 2 * self._reserve > self._pool.num_free or not self._will_fit(sequence, needed):
                    return
                self._residency.enter(sequence)
                self._adapter_slots.use(sequence.adapter)

    def _send_away(self) -> None:
        """Free some blocks before they are needed: of residents without a turn, whose next one is
        farthest."""
        if not self._residency.can_move:
            return
        wanted = self._reserve + 1
        while self._pool.num_free + self._residency.num_leaving < wanted:
            victim = self._next_departure()
            if victim is None:
                return
            seconds = self._residency.eviction_seconds(victim)
            is_guarded = self._policy.is_guarded and not victim.is_held
            if is_guarded and not self._guard.allows(victim, seconds, self._now):
                continue
            if self._residency.is_cheaper_to_move(victim):  # what is computed is not lost before it must be
                self._guard.spend(seconds)
                self._evict(victim, None)

    def _evict(self, victim: Sequence, better: Sequence | None) -> None:
        taker = None if better is None or better is victim else better.sequence_id
        self.evicted_for[victim.sequence_id] = taker
        self._residency.evict(victim)

    def _next_departure(self, after: Sequence | None = None) -> Sequence | None:
        """The resident without a turn whose next turn is farthest; with `after`, only who ranks behind it or
        is held."""
        residents = self._residents()
        while residents:
            victim = residents.pop()
            is_resident = victim.residence is Residence.FAST
            if not is_resident or victim.sequence_id in self._has_turn or victim is after:
                continue
            if after is None or victim.is_held or self._is_behind(victim, after):
                return victim
        return None

    def _residents(self) -> list[Sequence]:
        if self._departures is None:
            residents = [s for s in self._order if s.residence is Residence.FAST]
            self._departures = self._policy.departures(residents, self._now)[::-1]
        return self._departures
