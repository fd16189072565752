"""The sequences that are not finished, in the order of a policy, and the turns that each step gives them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from fastserve.config import ScheduleOptions
from fastserve.engine.block import BlockPool
from fastserve.engine.cost import OnlineStepCost, StepCost
from fastserve.engine.guard import Guard
from fastserve.engine.mover import Mover
from fastserve.engine.pace import Pace
from fastserve.engine.policy import make_policy
from fastserve.engine.policy.policy import Policy, rank
from fastserve.engine.residency import Residency
from fastserve.engine.sequence import Residence, Sequence
from fastserve.engine.turn import Round, Turn, total_work
from fastserve.types import Limits


class Scheduler:
    """Gives turns (see Round), and keeps account of them.

    Args:
        policy: may be changed at any time by `set_policy`.
        cost: of a step; what `commit` says is observed by it.
        prefill_chunk_tokens: most tokens of one prompt in one step.
    """

    def __init__(
        self,
        residency: Residency,
        limits: Limits,
        *,
        policy: Policy,
        cost: OnlineStepCost,
        pace: Pace,
        prefill_chunk_tokens: int | None = None,
    ) -> None:
        self.residency = residency
        self._limits = limits
        self._policy = policy
        self.cost = cost
        self._pace = pace
        self._guard = Guard()
        self._prefill_chunk_tokens = prefill_chunk_tokens or limits.max_tokens
        self._live: list[Sequence] = []  # in the order of their ranks, as of the last step
        self._had_turn: list[Sequence] = []  # in the last step
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live) or self.residency.is_moving

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def sequences(self) -> Seq[Sequence]:
        """All that are not finished; forks that wait for their prompt are left out."""
        return self._live

    def add(self, sequence: Sequence, now: float) -> None:
        self._policy.enter(sequence, now)
        self._live.append(sequence)

    def set_policy(self, spec: str, now: float) -> None:
        """Go on by another policy, from what every sequence has come to. Raises as make_policy."""
        policy = make_policy(spec, cost=self.cost, max_sequences=self._limits.max_sequences)
        for sequence in self._live:
            self._policy.leave(sequence)
            policy.enter(sequence, now)
        self._policy = policy

    def schedule(self, now: float) -> list[Turn]:
        """The turns of the next step. Empty where nobody can run now: all wait for a move, or are held."""
        self.residency.settle()
        self._policy.refresh(self._live, now)
        self._live.sort(key=rank)
        turns = Round(
            self.residency,
            policy=self._policy,
            guard=self._guard,
            pace=self._pace,
            limits=self._limits,
            prefill_chunk_tokens=self._prefill_chunk_tokens,
            now=now,
        ).make_turns(self._live)
        self._count_preemptions(turns)
        return turns

    def commit(self, turns: Seq[Turn], *, seconds: float, now: float) -> None:
        """A step has run these turns: their tokens are computed. Their outputs get their tokens after
        this."""
        self.cost.observe(total_work(turns), seconds)
        for turn in turns:
            sequence = turn.sequence
            sequence.num_computed_tokens += turn.num_tokens
            self.residency.register(sequence)
            sequence.attained_seconds += seconds
            sequence.resident_seconds += seconds
            self._policy.serve(sequence, seconds, now)
            if turn.outputs and sequence.forks:
                self._fork(sequence, now)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, completed, failed or aborted, at any moment, and free all that it holds."""
        if sequence.residence is Residence.FINISHED:
            return
        if sequence in self._live:
            self._live.remove(sequence)
            self._policy.leave(sequence)
        self.residency.release(sequence)

    def check_invariants(self) -> None:
        """Assert that blocks and sequences belong together."""
        self.residency.check_invariants(self._live)
        for sequence in self._live:
            assert sequence.num_computed_tokens <= len(sequence.token_ids) <= sequence.max_length

    def _fork(self, sequence: Sequence, now: float) -> None:
        """Its prompt is computed: its forks go on by themselves."""
        for child in sequence.forks:
            self.residency.fork(sequence, child)
            self.add(child, now)
        sequence.forks = []

    def _count_preemptions(self, turns: Seq[Turn]) -> None:
        """Of sequences that had a turn, are not finished, and have none."""
        running = {turn.sequence.sequence_id for turn in turns}
        for sequence in self._had_turn:
            is_over = sequence.residence is Residence.FINISHED or sequence.is_held
            if sequence.sequence_id not in running and not is_over:
                sequence.num_preemptions += 1
                self.num_preemptions += 1
        self._had_turn = [turn.sequence for turn in turns]


def make_scheduler(
    limits: Limits,
    *,
    block_size: int,
    options: ScheduleOptions,
    mover: Mover | None = None,
    initial_cost: StepCost | None = None,
) -> Scheduler:
    """A scheduler and all that it works with.

    Args:
        mover: copies blocks to a slow tier; None: there is none.
        initial_cost: of a step, as long as none has run.

    Raises:
        OptionError: an unknown policy or knob, or a value out of its range.
    """
    cost = OnlineStepCost(initial_cost or StepCost())
    pool = BlockPool(
        num_blocks=limits.num_blocks,
        block_size=block_size,
        eviction="lfu" if options.prefix_cache == "lfu" else "lru",
    )
    return Scheduler(
        Residency(pool, mover=mover, cost=cost, reuses_prefixes=options.prefix_cache != "off"),
        limits,
        policy=make_policy(options.policy, cost=cost, max_sequences=limits.max_sequences),
        cost=cost,
        pace=Pace(cost, max_tokens=limits.max_tokens, target_gap_seconds=options.target_gap_seconds),
        prefill_chunk_tokens=options.prefill_chunk_tokens,
    )
