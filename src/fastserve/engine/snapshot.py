"""What an engine looks like between two steps: its sequences in the order of their turns, its memory, and
who was preempted of late. Fields are named as those who watch a server read them, in JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

from fastserve.engine.completion import Chunk
from fastserve.engine.schedule import Preemption, PreemptionReason, Scheduler
from fastserve.engine.sequence import Residence, Sequence
from fastserve.engine.turn import Turn

MOST_SEQUENCES = 256  # of a snapshot, the first in the order of turns
_RECENT = 0.05  # weight of a step in the mean of the latest ones

Reason = Literal["evicted", "passed_over"]

SequenceState = Literal["waiting", "running", "paused", "slow", "moving", "held"]
"""What a sequence is doing.

`waiting`: it has had no turn yet.
`running`: it had a turn in the last step.
`paused`: it was preempted, and is in memory, or to be computed again.
`slow`: its blocks are in the slow tier; `moving`: on the way there, or back.
`held`: its reader is behind, so that it gets no turns.
"""


@dataclass(slots=True)  # not frozen: hundreds are made while no step runs
class SequenceSnapshot:
    """Of a sequence that is not finished."""

    id: int
    request_id: str  # as its caller names the request; the server: its x-request-id
    tenant: str
    priority_class: str
    state: SequenceState
    level: int  # which of the policy's queues it is in; 0 where there is one
    place: int  # in the order of turns, from 0
    prompt_tokens: int
    computed_tokens: int  # whose keys and values are kept
    completion_tokens: int
    max_tokens: int  # of the completion
    age_seconds: float  # since the request came
    attained_seconds: float  # of the steps in which it had a turn
    num_preemptions: int
    blocks: int


@dataclass(frozen=True, slots=True)
class PreemptionSnapshot:
    """A sequence that had a turn, and then had none before it was finished."""

    time: float  # Unix, seconds
    sequence_id: int
    tenant: str
    reason: Reason
    by: int | None  # whose sequence_id has its memory, or its turn; None: nobody's in particular


@dataclass(frozen=True, slots=True)
class FastBlocks:
    """Blocks of the fast tier: used are those that sequences own; cached those that nobody owns and that keep
    a prefix."""

    total: int
    used: int
    cached: int


@dataclass(frozen=True, slots=True)
class SlowBlocks:
    """Blocks of the slow tier; none where there is no such tier."""

    total: int
    used: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """Of keys and values, by tier."""

    fast: FastBlocks
    slow: SlowBlocks


@dataclass(frozen=True, slots=True)
class PrefixTokens:
    """Tokens that were looked for in the cache of prefixes, by whether they were found."""

    hit: int
    miss: int


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """Since the engine's start."""

    prompt_tokens: int  # computed in chunks, dropped ones again
    completion_tokens: int
    completions: int  # that have ended, by an error too
    steps: int
    evictions: int
    swapped_blocks_in: int
    swapped_blocks_out: int


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """Of one engine."""

    model: str  # its name
    policy: str
    policy_spec: str  # with the knobs that were given
    num_sequences: int  # that are not finished
    num_unstarted: int  # requests that wait for their first turn
    blocks: Blocks
    prefix_tokens: PrefixTokens
    totals: EngineTotals
    preemptions: Mapping[Reason, int]
    step_seconds: float | None  # mean of the latest steps; None: there was none
    sequences: Seq[SequenceSnapshot]  # the first MOST_SEQUENCES, in the order of their turns
    recent_preemptions: Seq[PreemptionSnapshot]  # the latest 64, oldest first


@dataclass(slots=True)
class StepTotals:
    """What an engine's steps have done so far, counted as they end."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    completions: int = 0
    steps: int = 0
    recent_seconds: float | None = None  # of a step, the mean of the latest ones

    def count_prompts(self, turns: Seq[Turn]) -> None:
        """These turns have run, and are not yet committed."""
        for turn in turns:
            sequence = turn.sequence
            left = sequence.num_prompt_tokens - sequence.num_computed_tokens
            if sequence.source is not None:
                self.prompt_tokens += sequence.source.num_tokens * sequence.is_source_unread
            elif left > 0:
                self.prompt_tokens += min(turn.num_tokens, left)

    def count(self, chunks: Seq[Chunk], *, seconds: float) -> None:
        """A step has ended, with these."""
        self.steps += 1
        for chunk in chunks:
            self.completion_tokens += chunk.token_id is not None
            self.completions += chunk.completion is not None
        recent = seconds if self.recent_seconds is None else self.recent_seconds
        self.recent_seconds = recent + _RECENT * (seconds - recent)


def take_snapshot(
    scheduler: Scheduler,
    *,
    policy_spec: str,
    priority_classes: Seq[str],
    request_names: Mapping[int, str],
    totals: StepTotals,
    now: float,
    unix_offset: float,
) -> EngineSnapshot:
    """Of the engine that has this scheduler, without a model's name. Nothing is changed by it.

    Args:
        request_names: by sequence_id.
        now: by the engine's clock; with `unix_offset` it is the time that others know.
    """
    pool, residency = scheduler.residency.pool, scheduler.residency
    counters = residency.counters
    had_turn = {sequence.sequence_id for sequence in scheduler.had_turn}
    sequences = [
        SequenceSnapshot(
            id=sequence.sequence_id,
            request_id=request_names[sequence.sequence_id],
            tenant=sequence.tenant,
            priority_class=priority_classes[sequence.class_index],
            state=_state_of(sequence, had_turn),
            level=scheduler.policy.level_of(sequence),
            place=place,
            prompt_tokens=sequence.num_prompt_tokens,
            computed_tokens=sequence.num_computed_tokens,
            completion_tokens=sequence.num_completion_tokens,
            max_tokens=sequence.max_tokens,
            age_seconds=now - sequence.arrival_seconds,
            attained_seconds=sequence.attained_seconds,
            num_preemptions=sequence.num_preemptions,
            blocks=max(len(sequence.block_table), len(sequence.slow_blocks)),
        )
        for place, sequence in enumerate(scheduler.order()[:MOST_SEQUENCES])
    ]
    return EngineSnapshot(
        model="",
        policy=scheduler.policy.name,
        policy_spec=policy_spec,
        num_sequences=len(scheduler.sequences),
        num_unstarted=scheduler.num_unstarted,
        blocks=Blocks(
            FastBlocks(pool.num_blocks, pool.num_blocks - pool.num_free, pool.num_cached),
            SlowBlocks(residency.num_slow_blocks, residency.num_slow_blocks_used),
        ),
        prefix_tokens=PrefixTokens(
            hit=counters.prefix_tokens, miss=counters.admitted_tokens - counters.prefix_tokens
        ),
        totals=EngineTotals(
            prompt_tokens=totals.prompt_tokens,
            completion_tokens=totals.completion_tokens,
            completions=totals.completions,
            steps=totals.steps,
            evictions=counters.evictions,
            swapped_blocks_in=counters.blocks_in,
            swapped_blocks_out=counters.blocks_out,
        ),
        preemptions={_REASONS[reason]: count for reason, count in scheduler.preemptions.items()},
        step_seconds=totals.recent_seconds,
        sequences=sequences,
        recent_preemptions=[_to_snapshot(p, unix_offset) for p in scheduler.recent_preemptions],
    )


_REASONS: Mapping[PreemptionReason, Reason] = {"evicted": "evicted", "passed over": "passed_over"}
_PLACES: Mapping[Residence, SequenceState] = {
    Residence.LEAVING: "moving",
    Residence.ARRIVING: "moving",
    Residence.SLOW: "slow",
}


def _state_of(sequence: Sequence, had_turn: Collection[int]) -> SequenceState:
    if sequence.is_held:
        return "held"
    if sequence.residence in _PLACES:
        return _PLACES[sequence.residence]
    if not sequence.is_started:
        return "waiting"
    return "running" if sequence.is_resident and sequence.sequence_id in had_turn else "paused"


def _to_snapshot(preemption: Preemption, unix_offset: float) -> PreemptionSnapshot:
    return PreemptionSnapshot(
        time=preemption.seconds + unix_offset,
        sequence_id=preemption.sequence_id,
        tenant=preemption.tenant,
        reason=_REASONS[preemption.reason],
        by=preemption.by,
    )
