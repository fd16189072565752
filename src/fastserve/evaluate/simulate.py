"""The real scheduler, policies and block pool, driven through a stream of requests under a fake clock."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from fastserve.config import ScheduleOptions
from fastserve.engine.policy.work import LengthPredictor
from fastserve.engine.schedule import Scheduler, make_scheduler
from fastserve.engine.sequence import Residence, Sequence
from fastserve.engine.turn import Turn
from fastserve.errors import MeasurementError
from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.simulated_machine import SimulatedMachine
from fastserve.evaluate.simulated_mover import SimulatedClock, SimulatedMover
from fastserve.types import Float64Array, Int64Array

_IDLE_SECONDS = 0.05  # how long the clock is let run where nobody has a turn and nothing is on its way
_MOST_IDLE_STEPS = 20_000


@dataclass(slots=True)
class Progress:
    """One request's life in the simulation."""

    index: int  # of its arrival
    completion_tokens: int
    first_seconds: float = -1.0  # when its first token came
    last_seconds: float = -1.0  # when its newest token came
    longest_gap: float = 0.0  # between two of its tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the requests of one run, [n] each, in the order of arrival, by the fake clock.

    A refused request would not have fitted the memory, alone; its times are NaN, as those of an unfinished
    one.
    """

    arrival_seconds: Float64Array
    prompt_tokens: Int64Array
    completion_tokens: Int64Array
    isolated_seconds: Float64Array  # to the last token, alone on the machine
    is_refused: np.ndarray[tuple[int], np.dtype[np.bool_]]
    first_token_seconds: Float64Array
    end_seconds: Float64Array
    longest_gap_seconds: Float64Array  # 0 where there is one token alone
    preemptions: Int64Array
    evictions: Int64Array
    swapped_blocks_out: int
    swapped_blocks_in: int
    dropped_tokens: int  # computed, given up, and to be computed again
    prefix_tokens: int  # of prompts, found in the prefix cache
    admitted_tokens: int  # that were looked for there
    num_steps: int
    busy_seconds: float


class Simulation:
    """Steps of a simulated machine, to which a caller adds requests; `simulate` does so as they arrive.

    Args:
        checks: assert the invariants of the scheduler after every step, which takes far longer.
    """

    def __init__(
        self,
        machine: SimulatedMachine,
        options: ScheduleOptions,
        arrivals: Seq[Arrival],
        *,
        checks: bool = False,
        predictor: LengthPredictor | None = None,
    ) -> None:
        self.clock = SimulatedClock()
        self._machine = machine
        self._arrivals = arrivals
        self._checks = checks
        self._mover = (
            SimulatedMover(
                self.clock,
                num_slow_blocks=machine.num_slow_blocks,
                seconds_per_block=machine.swap_seconds_per_block,
                is_duplex=machine.is_swap_duplex,
            )
            if machine.num_slow_blocks
            else None
        )
        self.scheduler: Scheduler = make_scheduler(
            machine.limits,
            block_size=machine.block_size,
            options=options,
            mover=self._mover,
            initial_cost=machine.cost.to_step_cost(),
            predictor=predictor,
        )
        self._progress: dict[int, Progress] = {}
        self.sequences: dict[int, Sequence] = {}  # not finished, by index of arrival
        self.num_steps = 0
        self.busy_seconds = 0.0
        self._num_idle_steps = 0
        n = len(arrivals)
        self._first = np.full(n, np.nan)
        self._end = np.full(n, np.nan)
        self._gap = np.full(n, np.nan)
        self._refused = np.zeros(n, np.bool_)
        self._preemptions = np.zeros(n, np.int64)
        self._evictions = np.zeros(n, np.int64)

    def add(self, index: int, *, now: float) -> None:
        """A request arrives, or is refused because it could never fit."""
        arrival = self._arrivals[index]
        if not self._machine.can_hold(arrival):
            self._refused[index] = True
            return
        sequence = Sequence(
            sequence_id=index,
            token_ids=arrival.prompt_ids(index),
            num_prompt_tokens=arrival.prompt_tokens,
            # What a user would give who does not know: a policy must not learn the length from it.
            max_tokens=self._machine.kv_tokens - arrival.prompt_tokens,
            arrival_seconds=now,
            tenant=arrival.tenant,
            scope=arrival.tenant.encode(),
        )
        self.sequences[index] = sequence
        self._progress[index] = Progress(index, arrival.completion_tokens)
        self.scheduler.add(sequence, self.clock.seconds)

    def step(self) -> bool:
        """Run one step. Whether anybody had a turn."""
        clock = self.clock
        turns = self.scheduler.schedule(clock.seconds)
        if not turns:
            return False
        seconds = self._machine.cost.seconds(turns)
        clock.seconds += seconds
        self.busy_seconds += seconds
        self.num_steps += 1
        self._num_idle_steps = 0
        self.scheduler.commit(turns, seconds=seconds, now=clock.seconds)
        self._emit(turns)
        if self._checks:
            self.scheduler.check_invariants()
        return True

    def wait(self, until: float | None) -> None:
        """Let the clock run to the next move that is done, or to `until`, the next arrival.

        Raises:
            MeasurementError: nothing will ever happen again, and there are unfinished sequences.
        """
        moves = None if self._mover is None else self._mover.next_seconds
        events = [time for time in (moves, until) if time is not None]
        if self.sequences:  # a policy or a guard may wait for time to pass
            events.append(self.clock.seconds + _IDLE_SECONDS)
            self._num_idle_steps += 1
            if self._num_idle_steps > _MOST_IDLE_STEPS and moves is None:
                raise MeasurementError(
                    f"{len(self.sequences)} simulated sequences have had no turn for "
                    f"{self._num_idle_steps * _IDLE_SECONDS:g} seconds",
                    hint="the policy or the scheduler has a defect: report the command",
                )
        if events:
            self.clock.seconds = max(self.clock.seconds, min(events))

    def outcome(self) -> Outcome:
        counters = self.scheduler.residency.counters
        arrivals = self._arrivals
        return Outcome(
            arrival_seconds=np.array([a.arrival_seconds for a in arrivals]),
            prompt_tokens=np.array([a.prompt_tokens for a in arrivals], np.int64),
            completion_tokens=np.array([a.completion_tokens for a in arrivals], np.int64),
            isolated_seconds=np.array([self._machine.isolated_seconds(a) for a in arrivals]),
            is_refused=self._refused,
            first_token_seconds=self._first,
            end_seconds=self._end,
            longest_gap_seconds=self._gap,
            preemptions=self._preemptions,
            evictions=self._evictions,
            swapped_blocks_out=counters.blocks_out,
            swapped_blocks_in=counters.blocks_in,
            dropped_tokens=counters.dropped_tokens,
            prefix_tokens=counters.prefix_tokens,
            admitted_tokens=counters.admitted_tokens,
            num_steps=self.num_steps,
            busy_seconds=self.busy_seconds,
        )

    def _emit(self, turns: Seq[Turn]) -> None:
        """Give every output its token, and finish those that have all of theirs."""
        now = self.clock.seconds
        all_progress = self._progress
        for turn in turns:
            for sequence in turn.outputs:
                sequence_id = sequence.sequence_id
                sequence.token_ids.append(sequence_id)
                progress = all_progress[sequence_id]
                if progress.first_seconds < 0:
                    progress.first_seconds = now
                elif now - progress.last_seconds > progress.longest_gap:
                    progress.longest_gap = now - progress.last_seconds
                progress.last_seconds = now
                if len(sequence.token_ids) - sequence.num_prompt_tokens >= progress.completion_tokens:
                    self._finish(sequence, progress)

    def _finish(self, sequence: Sequence, progress: Progress) -> None:
        index = progress.index
        self._first[index] = progress.first_seconds
        self._end[index] = progress.last_seconds
        self._gap[index] = progress.longest_gap
        self._preemptions[index] = sequence.num_preemptions
        self._evictions[index] = sequence.num_evictions
        del self._progress[index], self.sequences[index]
        sequence.is_complete = True
        self.scheduler.finish(sequence)
        assert sequence.residence is Residence.FINISHED


def simulate(
    machine: SimulatedMachine,
    options: ScheduleOptions,
    arrivals: Seq[Arrival],
    *,
    checks: bool = False,
    predictor: LengthPredictor | None = None,
) -> Outcome:
    """Run all requests to their ends. They arrive between steps, as at a real engine.

    >>> from fastserve.evaluate.simulated_machine import load_machine
    >>> one = Arrival(arrival_seconds=0.0, prompt_tokens=100, completion_tokens=10)
    >>> outcome = simulate(load_machine("a100"), ScheduleOptions(), [one])
    >>> float(outcome.end_seconds[0]) == float(outcome.isolated_seconds[0])
    True

    Args:
        arrivals: in the order of their times.
        checks: assert the scheduler's invariants after every step.
        predictor: tells requests apart, by the sequence_id that is their place among the arrivals.

    Raises:
        OptionError: an unknown policy or knob, or a value out of its range.
        MeasurementError: sequences are stuck, or take longer than all would one after the other.
    """
    end_of_patience = arrivals[-1].arrival_seconds + 2 * sum(map(machine.isolated_seconds, arrivals)) + 60.0
    simulation = Simulation(machine, options, arrivals, checks=checks, predictor=predictor)
    num_arrived = 0
    while True:
        now = simulation.clock.seconds
        while num_arrived < len(arrivals) and arrivals[num_arrived].arrival_seconds <= now:
            simulation.add(num_arrived, now=arrivals[num_arrived].arrival_seconds)
            num_arrived += 1
        if now > end_of_patience:
            raise MeasurementError(
                f"policy {options.policy!r} has not finished {len(simulation.sequences)} of {len(arrivals)} "
                f"requests after {now:.0f} simulated seconds, twice what they take one by one",
                hint="it evicts more than it computes: lower the load, or choose another policy",
            )
        if simulation.sequences and simulation.step():
            continue
        is_last = num_arrived == len(arrivals)
        if is_last and not simulation.sequences:
            return simulation.outcome()
        simulation.wait(None if is_last else arrivals[num_arrived].arrival_seconds)
