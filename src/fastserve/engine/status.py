"""An engine's figures at a moment between two steps, for metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from fastserve.engine.admission import Admission
from fastserve.engine.cost import StepCost
from fastserve.engine.residency import ResidencyCounters
from fastserve.engine.schedule import PreemptionReason, Scheduler
from fastserve.engine.sequence import Residence
from fastserve.engine.speculator import SpeculationCounters
from fastserve.engine.statistics import StepStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """What an engine is doing, and what it has done since its start."""

    policy: str
    num_waiting: int  # sequences without keys and values in memory
    num_resident: int
    num_slow: int  # in the slow tier, or on the way
    num_blocks: int
    num_free_blocks: int  # that nobody owns; cached ones among them
    num_cached_blocks: int
    num_slow_blocks_used: int
    num_preemptions: int
    preemptions: Mapping[PreemptionReason, int]
    queue_lengths: Mapping[tuple[str, int], int]  # by class and the policy's level: without keys and values
    # in the fast pool
    steps: StepStatistics
    num_unstarted: int  # requests that wait for their first turn
    num_refused: int  # requests, as the queue was full or their deadline could not be kept
    num_expired: int  # requests that took too long, or waited too long
    num_relegated: int  # sequences that cannot be in time any more, and go last
    num_insistent: int  # streams that have been paused for as long as may be, and go first
    residency: ResidencyCounters
    speculation: SpeculationCounters
    cost: StepCost  # as fitted to the steps so far


def take_status(
    scheduler: Scheduler, admission: Admission, steps: StepStatistics, priority_classes: Seq[str]
) -> EngineStatus:
    """A copy of all figures: later steps do not change it."""
    residency, pool = scheduler.residency, scheduler.residency.pool
    residences = Counter(sequence.residence for sequence in scheduler.sequences)
    num_waiting, num_resident = residences[Residence.NOWHERE], residences[Residence.FAST]
    return EngineStatus(
        policy=scheduler.policy.name,
        num_waiting=num_waiting,
        num_resident=num_resident,
        num_slow=len(scheduler.sequences) - num_waiting - num_resident,
        num_blocks=pool.num_blocks,
        num_free_blocks=pool.num_free,
        num_cached_blocks=pool.num_cached,
        num_slow_blocks_used=residency.num_slow_blocks_used,
        num_preemptions=scheduler.num_preemptions,
        preemptions=dict(scheduler.preemptions),
        queue_lengths={
            (priority_classes[class_index], level): count
            for (class_index, level), count in scheduler.queue_lengths().items()
        },
        steps=steps.copy(),
        num_unstarted=scheduler.num_unstarted,
        num_refused=admission.num_refused,
        num_expired=admission.num_expired,
        num_relegated=sum(sequence.is_relegated for sequence in scheduler.sequences),
        num_insistent=sum(sequence.is_insistent for sequence in scheduler.sequences),
        residency=replace(residency.counters),
        speculation=replace(scheduler.speculation),
        cost=scheduler.cost.model,
    )
