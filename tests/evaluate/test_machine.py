from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

pytest.importorskip("fastserve._native")

from evaluate_machine import make_limits

from fastserve.backends.native.executable import runnable_isas
from fastserve.backends.native.machine_limits import LimitProbe
from fastserve.errors import MeasurementError, OptionError
from fastserve.evaluate import machine
from fastserve.evaluate.machine import MIB, check_share, measure_limits, measure_read_rates

SECONDS = 0.01


class FakeProbe:
    isa = "fake"
    num_threads = 2

    def __init__(self, threads: int | None) -> None:
        self.num_threads = threads or 2

    def read_bytes_per_second(self, working_set_bytes: int, *, seconds: float) -> Mapping[str, float]:
        return {"slow": 1e9, "fast": 3e9, "middling": 2e9}

    def int8_operations_per_second(self, *, seconds: float) -> float:
        return 7.0

    def f32_operations_per_second(self, *, seconds: float) -> float:
        return 5.0


@pytest.mark.parametrize("isa", runnable_isas())
def test_every_instruction_set_measures_rates_that_a_machine_can_have(isa: str) -> None:
    probe = LimitProbe(1, isa)
    rates = probe.read_bytes_per_second(2 * MIB, seconds=SECONDS)
    assert len(rates) >= 2
    assert all(1e7 < rate < 1e12 for rate in rates.values())
    assert 1e8 < probe.int8_operations_per_second(seconds=SECONDS) < 1e13
    assert 1e8 < probe.f32_operations_per_second(seconds=SECONDS) < 1e12


def test_a_pass_of_several_threads_is_timed_whole() -> None:
    # Timed by stages, a late thread once saw a pass end as it began: 400 TB/s.
    rates = LimitProbe(4).read_bytes_per_second(MIB, seconds=0.05)
    assert max(rates.values()) < 2e12


def test_the_read_limit_is_the_fastest_way_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LimitProbe", FakeProbe)
    limits = measure_limits()
    assert (limits.read_bytes_per_second, limits.read_kernel) == (3e9, "fast")
    assert (limits.int8_operations_per_second, limits.f32_operations_per_second) == (7.0, 5.0)


def test_rates_are_tabled_by_working_set_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LimitProbe", FakeProbe)
    rates = measure_read_rates(2, working_sets=(MIB, 4 * MIB))
    assert [(rate.threads, rate.working_set_bytes) for rate in rates] == [
        (1, MIB),
        (1, 4 * MIB),
        (2, MIB),
        (2, 4 * MIB),
    ]


def test_one_thread_is_tabled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LimitProbe", FakeProbe)
    assert len(measure_read_rates(1, working_sets=(MIB,))) == 1


def test_working_sets_beyond_half_of_the_free_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LimitProbe", FakeProbe)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 8 * MIB)
    rates = measure_read_rates(1, working_sets=(4 * MIB, 5 * MIB))
    assert [rate.working_set_bytes for rate in rates] == [4 * MIB]


def test_of_two_measurements_the_higher_limit_counts() -> None:
    one = make_limits(read_bytes_per_second=3.0, int8_operations_per_second=1.0)
    other = dataclasses.replace(one, read_bytes_per_second=2.0, int8_operations_per_second=4.0)
    assert one.at_least(other) == other.at_least(one)
    assert one.at_least(other).read_bytes_per_second == 3.0
    assert one.at_least(other).int8_operations_per_second == 4.0


def test_a_share_above_the_limit_is_an_error_that_names_it() -> None:
    assert check_share("decode", 1.0) == 1.0
    with pytest.raises(MeasurementError, match=r"decode is 101\.0% of the limit"):
        check_share("decode", 1.01)


def test_threads_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match="threads=0"):
        measure_limits(0, seconds=SECONDS)
