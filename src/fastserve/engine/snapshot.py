"""What an engine looks like between two steps: its sequences in the order of their turns, its memory, and
who was preempted of late. Fields are named as those who watch a server read them, in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

MOST_SEQUENCES = 256  # of a snapshot, the first in the order of turns
MOST_PREEMPTIONS = 64  # of a snapshot, the latest

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
    reason: Literal["evicted", "passed_over"]
    by: int | None  # sequence_id of who has its memory, or the turn in its place; None: nobody's in particular


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
    preemptions: Mapping[str, int]  # by reason
    step_seconds: float | None  # mean of the latest steps; None: there was none
    sequences: Seq[SequenceSnapshot]  # the first MOST_SEQUENCES, in the order of their turns
    recent_preemptions: Seq[PreemptionSnapshot]  # the last MOST_PREEMPTIONS, the latest last
