"""What is known of a request when it has ended: for the log, and for metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

_KEY = "fastserve.record"


def _write_nothing() -> None:
    pass


@dataclass(slots=True, eq=False)
class RequestRecord:
    """Of one request. `details` go to the log as they are."""

    request_id: str
    arrival_seconds: float = field(default_factory=time.perf_counter)
    status: int | None = None  # None: there was no answer
    details: dict[str, Any] = field(default_factory=dict)
    goes_on: bool = False  # behind its answer: its line is written by who ends it
    write: Callable[[], None] = field(default=_write_nothing)  # its line in the log

    def attach(self, scope: Scope) -> None:
        scope[_KEY] = self

    @staticmethod
    def of(scope: Scope) -> RequestRecord:
        """The record of a request on its way."""
        record = scope[_KEY]
        assert isinstance(record, RequestRecord)
        return record
