"""The sequences that are not finished, in the order of a policy, and the turns that each step gives them."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, get_args

from fastserve.config import ScheduleOptions
from fastserve.engine.adapter_slots import AdapterSlots
from fastserve.engine.block import BlockPool
from fastserve.engine.cost import OnlineStepCost, StepCost
from fastserve.engine.draft_guesser import DraftGuesser
from fastserve.engine.draft_model import DraftModel
from fastserve.engine.guard import Guard
from fastserve.engine.guesser import Guesser
from fastserve.engine.least_time import LeastTime
from fastserve.engine.lookup_guesser import LookupGuesser
from fastserve.engine.mover import Mover
from fastserve.engine.pace import Pace
from fastserve.engine.pause import PauseBudget
from fastserve.engine.peak import PeakForecast
from fastserve.engine.policy import make_policy
from fastserve.engine.policy.policy import Policy
from fastserve.engine.policy.work import ExpectedWork, LengthPredictor
from fastserve.engine.precedence import Precedence
from fastserve.engine.relegation import Relegation
from fastserve.engine.residency import Residency
from fastserve.engine.sequence import Residence, Sequence
from fastserve.engine.session import Sessions
from fastserve.engine.speculator import SpeculationCounters, Speculator
from fastserve.engine.tenant import Tenants
from fastserve.engine.turn import Round, Turn, total_work
from fastserve.types import Limits

PreemptionReason = Literal["evicted", "passed over"]
"""Of a sequence that has no turn after it had one: its memory was taken, or others went first."""


@dataclass(frozen=True, slots=True)
class Preemption:
    """One of them."""

    seconds: float  # by the engine's clock
    sequence_id: int
    tenant: str
    reason: PreemptionReason
    by: int | None  # whose sequence_id has its memory, or its turn: then a newcomer's; None: nobody's in
    # particular


_MOST_REMEMBERED = 64  # preemptions, the latest
_STARTS_MEMORY = 0.99  # of how fast requests start: the last hundred steps count


class Scheduler:
    """Gives turns (see Round), and keeps account of them.

    Args:
        precedence: the order of turns; its policy may be changed at any time by `set_policy`.
        sessions: what those of the sequences that have one have attained.
        cost: of a step; what `commit` says is observed by it.
        prefill_chunk_tokens: most tokens of one prompt in one step.
        forecast: of the residents' blocks, for admission; None: free blocks are all that is asked for.
        relegation: marks those that cannot be in time.
        pauses: marks those that have been paused for long enough; not with a policy that has no guards.
        work: what is expected of sequences, which policies, forecast and relegation read; here it learns.
        speculator: adds drafts to the turns; None: there are none.
    """

    def __init__(
        self,
        residency: Residency,
        limits: Limits,
        *,
        precedence: Precedence,
        sessions: Sessions,
        cost: OnlineStepCost,
        pace: Pace,
        work: ExpectedWork,
        relegation: Relegation,
        pauses: PauseBudget,
        forecast: PeakForecast | None = None,
        prefill_chunk_tokens: int | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.adapter_slots = AdapterSlots(limits.num_adapter_slots)
        self.residency = residency
        self._limits = limits
        self._precedence = precedence
        self._sessions = sessions
        self.cost = cost
        self._pace = pace
        self._guard = Guard()
        self.work = work
        self._relegation = relegation
        self._pauses = pauses
        self._forecast = forecast
        self.chunk_tokens = min(prefill_chunk_tokens or limits.max_tokens, limits.max_tokens)
        self._speculator = speculator
        self._live: list[Sequence] = []  # in the order in which they came
        self._had_turn: list[Sequence] = []  # in the last step
        self.preemptions: dict[PreemptionReason, int] = dict.fromkeys(get_args(PreemptionReason), 0)
        self.recent_preemptions: deque[Preemption] = deque(maxlen=_MOST_REMEMBERED)
        self.num_unstarted = 0  # requests that have had no turn
        self._recent_starts = 0.0  # first turns, and ...
        self._recent_seconds = 0.0  # ... the steps while somebody waited for one, which are forgotten alike

    @property
    def has_work(self) -> bool:
        return bool(self._live) or self.residency.is_moving

    @property
    def policy(self) -> Policy:
        return self._precedence.policy

    @property
    def num_preemptions(self) -> int:
        return sum(self.preemptions.values())

    @property
    def seconds_per_start(self) -> float:
        """How long it has taken of late until another request had its first turn, while there was one that
        waited for it; infinite where none had."""
        return self._recent_seconds / self._recent_starts if self._recent_starts > 0.01 else math.inf

    @property
    def last_guess_seconds(self) -> float:
        """What the guesses of the last turns took."""
        return 0.0 if self._speculator is None else self._speculator.last_guess_seconds

    @property
    def speculation(self) -> SpeculationCounters:
        return SpeculationCounters() if self._speculator is None else self._speculator.counters

    @property
    def had_turn(self) -> Seq[Sequence]:
        """Those that had a turn in the last step, some of which may be finished."""
        return self._had_turn

    @property
    def sequences(self) -> Seq[Sequence]:
        """All that are not finished; forks that wait for their prompt are left out."""
        return self._live

    def queue_lengths(self) -> dict[tuple[int, int], int]:
        """Sequences without keys and values in the fast pool, by class_index and the policy's level."""
        return Counter(
            (s.class_index, self.policy.level_of(s)) for s in self._live if s.residence is not Residence.FAST
        )

    def order(self) -> Seq[Sequence]:
        """Sequences in the order of their turns, as it is now."""
        return self._precedence.arrange()

    def add(self, sequence: Sequence, now: float) -> None:
        self.num_unstarted += 1
        self._enter(sequence, now)

    def set_policy(self, spec: str, now: float) -> None:
        """Go on by another policy, from what every sequence has come to. Raises as make_policy."""
        policy = make_policy(spec, work=self.work, max_sequences=self._limits.max_sequences)
        arrived = sorted(self._live, key=lambda s: (s.arrival_seconds, s.sequence_id))
        self._precedence.set_policy(policy, arrived, now)
        for sequence in arrived:
            sequence.is_insistent &= policy.is_guarded

    def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        """Go on by other weights; who is not named has 1. What was charged stays as it is."""
        self._precedence.set_tenant_weights(weights)

    def schedule(self, now: float) -> list[Turn]:
        """The turns of the next step. Empty where nobody can run now: all wait for a move, or are held."""
        self.residency.settle()
        self._precedence.charge(self._had_turn)  # their tokens have come
        self._relegation.refresh(self._live, now)
        has_exceptions = self._relegation.has_any
        if self.policy.is_guarded:
            self._pauses.refresh(self._live, now)
            has_exceptions |= self._pauses.has_any
        self._precedence.has_exceptions = has_exceptions
        self._precedence.refresh(self._live, now)
        self.adapter_slots.begin(self._live)
        round_ = Round(
            self.residency,
            policy=self._precedence,
            guard=self._guard,
            pace=self._pace,
            forecast=self._forecast,
            limits=self._limits,
            prefill_chunk_tokens=self.chunk_tokens,
            now=now,
            adapter_slots=self.adapter_slots,
        )
        turns = round_.make_turns(self._precedence.arrange())
        self._precedence.note(turns)
        self._count_preemptions(turns, round_.evicted_for, now)
        return turns if self._speculator is None else self._speculator.add_drafts(turns)

    def refuse_drafts(self, turns: Seq[Turn]) -> None:
        """Memory has run out in a step by its drafts: it is run without them, and so are the next ones."""
        assert self._speculator is not None
        self._speculator.refuse(sum(len(turn.drafts) for turn in turns))

    def commit(self, turns: Seq[Turn], *, seconds: float, now: float, lost_seconds: float = 0.0) -> None:
        """A step has run these turns: their tokens are computed. Their outputs get their tokens after this.

        Args:
            seconds: from the making of the turns to their results.
            lost_seconds: of these, those of a run that failed: they say nothing of what such a step costs.
        """
        work = total_work(turns)
        elapsed_seconds = seconds
        guess_seconds = self.last_guess_seconds
        step_seconds = self.cost.plausible_seconds(work, max(seconds - lost_seconds - guess_seconds, 0.0))
        seconds = step_seconds + guess_seconds  # what nobody has had is not charged
        is_plain = not any(turn.num_scored for turn in turns)  # their output rows are no part of the work
        if is_plain:
            self.cost.observe(work, step_seconds)
        if self._speculator is not None:
            self._speculator.observe(work, seconds, is_plain=is_plain)
        if self.num_unstarted:
            self._recent_starts *= _STARTS_MEMORY
            self._recent_seconds = _STARTS_MEMORY * self._recent_seconds + seconds
        for turn in turns:
            sequence = turn.sequence
            if not sequence.is_started:
                self._start(sequence, now - elapsed_seconds)
            sequence.num_computed_tokens += turn.num_tokens
            self.residency.register(sequence)
            sequence.attained_seconds += seconds
            sequence.service_seconds += elapsed_seconds / len(turns)
            sequence.resident_seconds += seconds
            if sequence.session:
                self._sessions.serve(sequence, seconds, now)
            if turn.outputs and sequence.forks:
                self._fork(sequence, now)
        self._precedence.serve([turn.sequence for turn in turns], seconds, now)
        streams = [sequence for turn in turns for sequence in turn.outputs]
        self._pace.give(streams, now)
        self._pauses.give(streams, elapsed_seconds, now)

    def accept(self, sequence: Sequence) -> None:
        """The last token that it got was drafted, and right: its keys and values are computed already."""
        assert self._speculator is not None
        sequence.num_computed_tokens += 1
        self.residency.register(sequence)
        self._speculator.accept(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, completed, failed or aborted, at any moment, and free all that it holds."""
        if sequence.residence is Residence.FINISHED:
            return
        if sequence in self._live:
            self._live.remove(sequence)
            self._precedence.leave(sequence)
            if sequence.session:
                self._sessions.leave(sequence)
            self.num_unstarted -= not sequence.is_started
            self.work.leave(sequence)
            if self._forecast is not None:
                self._forecast.forget(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence)
        self.residency.release(sequence)

    def check_invariants(self) -> None:
        """Assert that blocks and sequences belong together."""
        self.residency.check_invariants(self._live)
        self._precedence.check_invariants(self._live)
        if self._speculator is not None:
            self._speculator.guesser.check_invariants()
        assert self.num_unstarted == sum(not sequence.is_started for sequence in self._live)
        for sequence in self._live:
            assert sequence.num_computed_tokens <= len(sequence.token_ids) <= sequence.max_length

    def _enter(self, sequence: Sequence, now: float) -> None:
        if sequence.session:
            self._sessions.enter(sequence, now)
        if sequence.residence is Residence.NOWHERE:
            sequence.num_cached_tokens = len(sequence.token_ids) - self.residency.num_to_compute(sequence)
        self.work.enter(sequence)
        self._precedence.enter(sequence, now)
        self._live.append(sequence)

    def _start(self, sequence: Sequence, now: float) -> None:
        """It has its first turn. What it has found in the cache of prefixes is not charged to its tenant."""
        sequence.is_started = True
        sequence.start_seconds = now
        sequence.num_reused_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        sequence.num_charged_tokens = sequence.num_reused_tokens
        self.num_unstarted -= 1
        self._recent_starts += 1

    def _fork(self, sequence: Sequence, now: float) -> None:
        """Its prompt is computed: its forks go on by themselves."""
        for child in sequence.forks:
            self.residency.fork(sequence, child)
            child.is_started = True
            child.start_seconds = sequence.start_seconds
            child.num_charged_tokens = child.num_prompt_tokens  # charged to the first of them
            self._enter(child, now)
        sequence.forks = []

    def branch(self, sequence: Sequence, child: Sequence, now: float) -> None:
        """A child, whose tokens begin with those of this sequence, goes on by itself: from its blocks, where
        it has them in the fast pool, else from the beginning."""
        if sequence.residence is Residence.FAST:
            self.residency.fork(sequence, child)
        child.is_started = True
        self._enter(child, now)

    def _count_preemptions(self, turns: Seq[Turn], evicted_for: Mapping[int, int | None], now: float) -> None:
        """Of sequences that had a turn, are not finished, and have none."""
        running = {turn.sequence.sequence_id for turn in turns}
        preempted = [
            sequence
            for sequence in self._had_turn
            if sequence.sequence_id not in running
            and sequence.residence is not Residence.FINISHED
            and not sequence.is_held
        ]
        if preempted:
            had_turn = {sequence.sequence_id for sequence in self._had_turn}
            newcomers = (
                turn.sequence.sequence_id for turn in turns if turn.sequence.sequence_id not in had_turn
            )
            for sequence in preempted:
                sequence_id = sequence.sequence_id
                reason: PreemptionReason = "passed over" if sequence.is_resident else "evicted"
                by = next(newcomers, None) if sequence.is_resident else evicted_for.get(sequence_id)
                sequence.num_preemptions += 1
                self.preemptions[reason] += 1
                self.recent_preemptions.append(Preemption(now, sequence_id, sequence.tenant, reason, by))
        self._had_turn = [turn.sequence for turn in turns]


def make_scheduler(
    limits: Limits,
    *,
    block_size: int,
    options: ScheduleOptions,
    mover: Mover | None = None,
    initial_cost: StepCost | None = None,
    predictor: LengthPredictor | None = None,
    draft_model: DraftModel | None = None,
    has_sources: bool = False,
) -> Scheduler:
    """A scheduler and all that it works with.

    Args:
        mover: copies blocks to a slow tier; None: there is none.
        initial_cost: of a step, as long as none has run.
        predictor: tells requests of one tenant and endpoint apart whose completions differ in length, for
            policies that reckon with it.
        draft_model: where the options say that one guesses.
        has_sources: an encoder reads the prompts, whole: what two begin with they do not share.

    Raises:
        OptionError: an unknown policy or knob, or a value out of its range.
    """
    cost = OnlineStepCost(initial_cost or StepCost())
    work = ExpectedWork(cost, predictor=predictor)
    chunk_tokens = min(options.prefill_chunk_tokens or limits.max_tokens, limits.max_tokens)
    tenants = Tenants(options.tenant_weights, chunk_tokens=chunk_tokens, most_turns=limits.max_sequences)
    pool = BlockPool(
        num_blocks=limits.num_blocks,
        block_size=block_size,
        eviction="lfu" if options.prefix_cache == "lfu" else "lru",
    )
    reuses_prefixes = options.prefix_cache != "off" and not has_sources
    residency = Residency(pool, mover=mover, cost=cost, reuses_prefixes=reuses_prefixes)
    return Scheduler(
        residency,
        limits,
        precedence=Precedence(
            make_policy(options.policy, work=work, max_sequences=limits.max_sequences),
            tenants=None if options.fair_share == "off" else tenants,
        ),
        sessions=Sessions(idle_seconds=options.session_idle_seconds),
        cost=cost,
        pace=Pace(
            cost,
            max_tokens=limits.max_tokens,
            target_gap_seconds=options.target_gap_seconds,
            most_slack_seconds=options.most_slack_seconds,
        ),
        work=work,
        relegation=Relegation(
            LeastTime(work, chunk_tokens=chunk_tokens), first_token_seconds=options.first_token_seconds
        ),
        pauses=PauseBudget(options.pause_budget_seconds),
        forecast=_make_forecast(residency, work, options),
        prefill_chunk_tokens=options.prefill_chunk_tokens,
        speculator=_make_speculator(residency, limits, cost, options, draft_model),
    )


def _make_forecast(residency: Residency, work: ExpectedWork, options: ScheduleOptions) -> PeakForecast | None:
    if not options.peak_quantile:
        return None
    return PeakForecast(work, residency, quantile=options.peak_quantile)


def _make_speculator(
    residency: Residency,
    limits: Limits,
    cost: OnlineStepCost,
    options: ScheduleOptions,
    draft_model: DraftModel | None,
) -> Speculator | None:
    assert (draft_model is not None) == (options.speculation == "draft")
    if options.speculation == "off":
        return None
    guesser: Guesser
    if draft_model is not None:
        guesser = DraftGuesser(draft_model, max_draft_tokens=options.max_draft_tokens)
    else:
        guesser = LookupGuesser(
            max_draft_tokens=options.max_draft_tokens,
            prompt_lookup_min=options.prompt_lookup_min,
            prompt_lookup_max=options.prompt_lookup_max,
        )
    return Speculator(
        residency,
        limits,
        guesser,
        cost=cost,
        max_draft_tokens=options.max_draft_tokens,
        target_gap_seconds=options.target_gap_seconds,
    )
