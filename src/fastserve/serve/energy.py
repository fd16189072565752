"""Whose it is what the machine consumes, where it tells."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from time import monotonic

from fastserve.engine.energy import EnergyCounter
from fastserve.serve.usage import TenantUsage

logger = logging.getLogger(__name__)


class EnergyMeter:
    """Adds up what the machine consumes, and hands it to tenants.

    What was consumed while requests ran is theirs, by the seconds of service that each tenant was given
    meanwhile; what was consumed while there was no request is nobody's.

    Args:
        counters: of `find_counters`; without any nothing is known.
    """

    def __init__(self, counters: Iterable[EnergyCounter]) -> None:
        self._counters = list(counters)
        self.is_known = bool(self._counters)
        self._told: dict[int, float] = {}  # seconds of service that are handed out, by id of the usage
        self._pending_joules = 0.0  # of requests that run and have not been given service yet
        self._last_seconds = monotonic()
        self.joules = 0.0
        self.watts: float | None = None  # of late

    def describe(self) -> dict[str, float | None]:
        """Watts of late and joules since the start, None where they are not known."""
        return {"watts": self.watts, "joules": round(self.joules, 3) if self.is_known else None}

    def sample(self, usages: Iterable[TenantUsage], *, is_busy: bool) -> None:
        """To be called about once a second, always with all usages there are.

        Args:
            is_busy: requests are under way.
        """
        if not self._counters:
            return
        now = monotonic()
        try:
            joules = sum(counter.advance() for counter in self._counters)
        except (OSError, ValueError) as error:
            logger.warning("what the machine consumes is not known any more: %s", error)
            self._counters, self.watts, self.is_known = [], None, False
            return
        self.watts = joules / max(now - self._last_seconds, 1e-3)
        self._last_seconds = now
        self.joules += joules
        self._hand_out(joules, list(usages), is_busy=is_busy)

    def _hand_out(self, joules: float, usages: list[TenantUsage], *, is_busy: bool) -> None:
        served = {id(usage): usage.service_seconds - self._told.get(id(usage), 0.0) for usage in usages}
        total_seconds = sum(served.values())
        self._pending_joules += joules
        if total_seconds > 0:
            for usage in usages:
                usage.joules += self._pending_joules * served[id(usage)] / total_seconds
                self._told[id(usage)] = usage.service_seconds
        if total_seconds > 0 or not is_busy:
            self._pending_joules = 0.0
