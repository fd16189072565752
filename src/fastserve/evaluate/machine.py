"""The machine's limits, which every share is a share of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastserve.backends.native.machine_limits import LimitProbe
from fastserve.engine.available_memory import available_memory_bytes
from fastserve.errors import MeasurementError, OptionError

MIB = 2**20
WORKING_SETS = tuple(size * MIB for size in (4, 16, 64, 256, 1024))
DEFAULT_WORKING_SET = 1024 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRate:
    """The rate at which one working set is read by so many threads, and the fastest way to read."""

    working_set_bytes: int
    threads: int
    bytes_per_second: float
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """What the machine does at most with so many threads of one instruction set.

    `read_bytes_per_second` is that of `working_set_bytes`.
    """

    isa: str
    threads: int
    working_set_bytes: int
    read_bytes_per_second: float
    read_kernel: str
    int8_operations_per_second: float
    f32_operations_per_second: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def at_least(self, other: MachineLimits) -> MachineLimits:
        """The higher limit of each kind: of two measurements of one machine, what was reached is possible."""
        assert (self.isa, self.threads) == (other.isa, other.threads)
        assert self.working_set_bytes == other.working_set_bytes
        reader = max(self, other, key=lambda limits: limits.read_bytes_per_second)
        return MachineLimits(
            isa=self.isa,
            threads=self.threads,
            working_set_bytes=self.working_set_bytes,
            read_bytes_per_second=reader.read_bytes_per_second,
            read_kernel=reader.read_kernel,
            int8_operations_per_second=max(self.int8_operations_per_second, other.int8_operations_per_second),
            f32_operations_per_second=max(self.f32_operations_per_second, other.f32_operations_per_second),
        )


def measure_limits(
    threads: int | None = None, *, working_set_bytes: int = DEFAULT_WORKING_SET, seconds: float = 0.5
) -> MachineLimits:
    """Measure the limits, each for so many seconds.

    Raises:
        OptionError: `threads` is out of range, or there is no memory for the working set.
    """
    probe = LimitProbe(threads)
    rate = measure_read_rate(probe, working_set_bytes, seconds=seconds)
    return MachineLimits(
        isa=probe.isa,
        threads=probe.num_threads,
        working_set_bytes=working_set_bytes,
        read_bytes_per_second=rate.bytes_per_second,
        read_kernel=rate.kernel,
        int8_operations_per_second=probe.int8_operations_per_second(seconds=seconds / 2),
        f32_operations_per_second=probe.f32_operations_per_second(seconds=seconds / 2),
    )


def measure_read_rates(
    threads: int | None = None, *, working_sets: Sequence[int] = WORKING_SETS, seconds: float = 0.5
) -> list[ReadRate]:
    """The read rate of every working set, by one thread and by all; sets that need more than half of the
    memory that is free are left out. Raises as `measure_limits`.
    """
    available = available_memory_bytes()
    fitting = [size for size in working_sets if available is None or 2 * size <= available]
    probes = [LimitProbe(1)]
    every = LimitProbe(threads)
    if every.num_threads > 1:
        probes.append(every)
    return [measure_read_rate(probe, size, seconds=seconds) for probe in probes for size in fitting]


def measure_read_rate(probe: LimitProbe, working_set_bytes: int, *, seconds: float) -> ReadRate:
    """The fastest of all ways to read. Raises as `measure_limits`."""
    try:
        rates = probe.read_bytes_per_second(max(working_set_bytes, MIB), seconds=seconds)
    except MemoryError:
        raise OptionError(
            f"a working set of {working_set_bytes} bytes does not fit the free memory",
            hint="free memory, or measure a smaller working set",
        ) from None
    kernel = max(rates, key=rates.__getitem__)
    return ReadRate(
        working_set_bytes=working_set_bytes,
        threads=probe.num_threads,
        bytes_per_second=rates[kernel],
        kernel=kernel,
    )


def check_share(what: str, share: float) -> float:
    """The share itself.

    Raises:
        MeasurementError: it is above 1, so that either side of it was measured wrongly.
    """
    if share > 1:
        raise MeasurementError(
            f"{what} is {share:.1%} of the limit measured in the same run: more than the machine can do",
            hint="something else slowed the measurement of the limit: run it again on an idle machine",
        )
    return share
