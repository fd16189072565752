"""What the machine consumes, where it tells (RAPL, by Linux's powercap).

Source of the files: https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

POWERCAP = Path("/sys/class/powercap")
_MICROJOULES = 1e-6
_SAMPLE_SECONDS = 30.0  # a counter of 2^38 microjoules begins anew after ten minutes at 400 watts

logger = logging.getLogger(__name__)


class EnergyCounter:
    """One domain of RAPL: a counter of microjoules that begins anew beyond its range."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._read()

    def advance(self) -> float:
        """Joules since it was read last."""
        now = self._read()
        passed, self._last = now - self._last, now
        return _MICROJOULES * (passed if passed >= 0 else passed + self._range)

    def _read(self) -> int:
        return int(self._path.read_text())


def find_counters(folder: Path = POWERCAP) -> list[EnergyCounter]:
    """The domains that together are the processors and their memory: packages, and DRAM, which is no part of
    them; cores and graphics are parts of a package. None where the machine has none, or root alone may read
    them."""
    counters = []
    for domain in sorted(folder.glob("intel-rapl:*")):
        try:
            name = (domain / "name").read_text().strip()
            if re.fullmatch(r"package-\d+|dram", name):
                counters.append(EnergyCounter(domain))
        except (OSError, ValueError) as error:
            logger.info("what the machine consumes is not known: %s: %s", domain, error)
            return []
    return counters


class EnergyReading:
    """What the machine consumes while a context lasts, all that runs on it included.

    >>> with EnergyReading(find_counters()) as reading:
    ...     pass
    >>> reading.joules is None or reading.joules >= 0
    True

    Args:
        counters: of `find_counters`; without any nothing is known.
    """

    def __init__(self, counters: Sequence[EnergyCounter]) -> None:
        self._counters = counters
        self._has_ended = Event()
        self._thread = Thread(target=self._sample, name="fastserve-energy", daemon=True)
        self.joules: float | None = None  # once the context has ended; None where it is not known

    def __enter__(self) -> Self:
        if self._counters:
            for counter in self._counters:
                counter.advance()
            self.joules = 0.0
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._counters:
            self._has_ended.set()
            self._thread.join()

    def _sample(self) -> None:
        """Add up in time, and once more at the end."""
        has_ended = False
        while not has_ended and self.joules is not None:
            has_ended = self._has_ended.wait(_SAMPLE_SECONDS)
            try:
                self.joules += sum(counter.advance() for counter in self._counters)
            except (OSError, ValueError) as error:
                logger.warning("what the machine consumes is not known any more: %s", error)
                self.joules = None
