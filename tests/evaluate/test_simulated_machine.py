from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.engine.mover import Move
from fastserve.errors import OptionError
from fastserve.evaluate.arrival import Arrival
from fastserve.evaluate.simulated_machine import MACHINE_NAMES, SimulatedMachine, load_machine
from fastserve.evaluate.simulated_mover import SimulatedClock, SimulatedMover


@pytest.mark.parametrize("name", MACHINE_NAMES)
def test_shipped_machines_are_whole_and_name_their_source(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert len(machine.source) > 40
    assert machine.num_slow_blocks > machine.num_blocks > machine.max_sequences


def test_the_a100_is_the_published_fit() -> None:
    """microsoft/sarathi-serve at 72339db5: 14.9 ms a step; a decode 95 us, and 0.11 us a token of context."""
    machine = load_machine("a100")
    one = Arrival(arrival_seconds=0, prompt_tokens=1, completion_tokens=2)
    decode = machine.isolated_seconds(one) - machine.isolated_seconds(
        Arrival(arrival_seconds=0, prompt_tokens=1, completion_tokens=1)
    )
    assert decode == pytest.approx(0.014936 + 5.882475e-05 + 3.634519e-05 + 2 * 1.111258e-07)
    assert (machine.max_tokens, machine.max_sequences, machine.kv_tokens) == (512, 128, 150_000)


def test_a_written_machine_is_read_back(tmp_path: Path) -> None:
    machine = load_machine("cpu")
    path = tmp_path / "fit.json"
    path.write_text(json.dumps({**machine.to_json(), "fit": {"num_steps": 3}}))
    assert load_machine(str(path)) == machine


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"cost": {"fixed_seconds": -1, "prefill_seconds": 1, "decode_seconds": 1}}, "fixed_seconds=-1"),
        ({"cost": {"fixed_seconds": 1}}, "lacks a field"),
        ({"cost": {"fixed_seconds": 0, "prefill_seconds": 0, "decode_seconds": 0}}, "takes no time"),
        ({"cost": None}, "cost of the machine is not an object"),
        ({"swap_seconds_per_block": "1"}, "swap_seconds_per_block='1'"),
    ],
)
def test_a_wrong_machine_is_named_by_field(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps({**load_machine("cpu").to_json(), **change}))
    with pytest.raises(OptionError, match=said):
        load_machine(str(path))


def test_an_unknown_machine_is_named() -> None:
    with pytest.raises(OptionError, match="cost 'tpu' is neither cpu nor a100 nor a file"):
        load_machine("tpu")


def test_less_memory_keeps_the_proportion_of_the_tiers() -> None:
    machine: SimulatedMachine = load_machine("a100").with_kv_tokens(16_000)
    assert (machine.num_blocks, machine.num_slow_blocks) == (1000, 4000)
    with pytest.raises(OptionError, match="kv_tokens=3"):
        machine.with_kv_tokens(3)


def test_one_channel_serves_both_directions_in_turn() -> None:
    clock = SimulatedClock()
    mover = SimulatedMover(clock, num_slow_blocks=8, seconds_per_block=1.0, is_duplex=False)
    mover.submit(Move(1, "out", ((0, 0),)))
    mover.submit(Move(2, "in", ((1, 1),)))
    clock.seconds = 1.0
    assert [result.move.sequence_id for result in mover.poll()] == [1]
    assert mover.next_seconds == 2.0


def test_moves_wait_for_those_before_in_their_direction_alone() -> None:
    clock = SimulatedClock()
    mover = SimulatedMover(clock, num_slow_blocks=8, seconds_per_block=1.0)
    out, behind, back = (
        Move(1, "out", ((0, 0), (1, 1))),
        Move(2, "out", ((2, 2),)),
        Move(3, "in", ((3, 3),)),
    )
    for move in (out, behind, back):
        mover.submit(move)
    clock.seconds = 1.0
    assert [result.move for result in mover.poll()] == [back]
    mover.wait(60.0)
    assert clock.seconds == 2.0
    assert [(result.move, result.seconds) for result in mover.poll()] == [(out, 2.0)]
    mover.wait(0.25)
    assert (clock.seconds, mover.poll(), mover.next_seconds) == (2.25, [], 3.0)
