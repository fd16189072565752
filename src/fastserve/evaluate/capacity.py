"""How much work a simulated machine does for a kind of traffic: what load 1.0 means."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from fastserve.config import ScheduleOptions
from fastserve.engine.sequence import Sequence
from fastserve.errors import OptionError
from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.simulate import Simulation
from fastserve.evaluate.simulated_machine import SimulatedMachine

_RAMP_SHARE = 0.2  # of the requests, during whose admission the machine fills, and which is not measured
_BACKLOG = 16  # requests that wait at least, so that nothing that fits is missed


def measure_capacity(machine: SimulatedMachine, arrivals: Seq[Arrival]) -> float:
    """Work done in a second where requests are always waiting, first come, first served.

    Work is what requests add to full steps, in seconds (SimulatedMachine.work_seconds): 0.7 is a machine of
    whose time 30 % goes into what steps cost anyway. It is measured from when a fifth of the requests have
    been let in to when the last one has come, counting what requests have done of their work, finished or
    not.

    Raises:
        OptionError: too few requests fit the machine.
    """
    fitting = [arrival for arrival in arrivals if machine.can_hold(arrival)]
    if len(fitting) < 2 * _BACKLOG:
        raise OptionError(
            f"{len(fitting)} of {len(arrivals)} requests fit the machine's {machine.kv_tokens} KV tokens",
            hint=f"give at least {2 * _BACKLOG} that do: more requests, or more kv_tokens",
        )
    simulation = Simulation(machine, ScheduleOptions(policy="fcfs", fair_share="off"), fitting)
    num_ramp = max(int(_RAMP_SHARE * len(fitting)), _BACKLOG)
    start_seconds = start_work = 0.0
    for index, _ in enumerate(fitting):
        simulation.add(index, now=simulation.clock.seconds)
        while _num_waiting(simulation) >= _BACKLOG:
            if not simulation.step():
                simulation.wait(None)
        if index == num_ramp:
            start_seconds = simulation.clock.seconds
            start_work = _work_done(machine, fitting, simulation, num_added=index + 1)
    end_work = _work_done(machine, fitting, simulation, num_added=len(fitting))
    return (end_work - start_work) / max(simulation.clock.seconds - start_seconds, 1e-9)


def mean_work(machine: SimulatedMachine, arrivals: Seq[Arrival]) -> float:
    """Seconds of work of a request, of those that fit."""
    seconds = [machine.work_seconds(arrival) for arrival in arrivals if machine.can_hold(arrival)]
    return sum(seconds) / len(seconds)


def _num_waiting(simulation: Simulation) -> int:
    return sum(not sequence.attained_seconds for sequence in simulation.sequences.values())


def _work_done(
    machine: SimulatedMachine, arrivals: Seq[Arrival], simulation: Simulation, *, num_added: int
) -> float:
    """Work of all that was added, as far as it is done."""
    live = simulation.sequences
    finished = (machine.work_seconds(arrivals[i]) for i in range(num_added) if i not in live)
    return sum(finished) + sum(_work_of(machine, sequence) for sequence in live.values())


def _work_of(machine: SimulatedMachine, sequence: Sequence) -> float:
    """Work that an unfinished sequence has behind it."""
    computed, prompt = sequence.num_computed_tokens, sequence.num_prompt_tokens
    cost = machine.cost
    return cost.prefill_work_seconds(min(computed, prompt), machine.max_tokens) + cost.decode_work_seconds(
        prompt, max(computed - prompt, 0)
    )
