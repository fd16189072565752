"""What the machine consumes, by a made-up folder of powercap."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.engine.energy import find_counters
from fastserve.serve import energy
from fastserve.serve.energy import EnergyMeter
from fastserve.serve.usage import TenantUsage

RANGE = 262_143_328_850


def write(folder: Path, domain: str, name: str, microjoules: int) -> Path:
    path = folder / domain
    path.mkdir(exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


@pytest.fixture
def clock(monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(energy, "monotonic", lambda: seconds[0])
    return seconds


def test_packages_and_memory_are_counted_once(tmp_path) -> None:
    write(tmp_path, "intel-rapl:0", "package-0", 0)
    write(tmp_path, "intel-rapl:0:0", "core", 0)
    write(tmp_path, "intel-rapl:0:1", "dram", 0)
    write(tmp_path, "intel-rapl:1", "package-1", 0)
    write(tmp_path, "intel-rapl:2", "psys", 0)
    write(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    (tmp_path / "dtpm").mkdir()
    assert len(find_counters(tmp_path)) == 3


def test_a_counter_that_begins_anew_goes_on(tmp_path) -> None:
    file = write(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    (counter,) = find_counters(tmp_path)
    file.write_text("2000000")
    assert counter.advance() == pytest.approx(3.0)
    file.write_text("2500000")
    assert counter.advance() == pytest.approx(0.5)


def test_a_machine_that_tells_nothing_has_unknown_energy(tmp_path) -> None:
    assert find_counters(tmp_path / "missing") == []
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "name").write_text("package-0\n")  # and no counter that may be read
    assert find_counters(tmp_path) == []
    usage = TenantUsage()
    usage.serve(1, 1.0)
    meter = EnergyMeter([])
    meter.sample([usage], is_busy=True)
    assert meter.describe() == {"watts": None, "joules": None}
    assert usage.joules == 0.0


def test_energy_of_a_busy_time_is_shared_by_seconds_of_service(tmp_path, clock) -> None:
    file = write(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(find_counters(tmp_path))
    alice, bob = TenantUsage(), TenantUsage()

    def sample(joules: float, *served: float, is_busy: bool = True) -> None:
        file.write_text(str(int(file.read_text()) + int(joules * 1e6)))
        clock[0] += 2.0
        for usage, seconds in zip((alice, bob), served, strict=True):
            usage.serve(0, seconds)
        meter.sample([alice, bob], is_busy=is_busy)

    sample(30.0, 2.0, 1.0)
    assert (alice.joules, bob.joules) == pytest.approx((20.0, 10.0))
    assert meter.watts == pytest.approx(15.0)
    sample(40.0, 0.0, 0.0, is_busy=False)  # nobody's
    sample(50.0, 0.0, 0.0)  # a long prompt is read: its service is told with its first token
    sample(10.0, 0.0, 3.0)
    assert (alice.joules, bob.joules) == pytest.approx((20.0, 70.0))
    assert meter.joules == pytest.approx(130.0)


def test_a_counter_that_cannot_be_read_any_more_ends_the_measurement_and_nothing_else(
    tmp_path, clock, caplog
) -> None:
    file = write(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(find_counters(tmp_path))
    file.unlink()
    for _ in range(2):
        meter.sample([TenantUsage()], is_busy=True)
    assert meter.watts is None
    assert not meter.is_known
    assert [record.message for record in caplog.records if "not known any more" in record.message]
    assert len(caplog.records) == 1
