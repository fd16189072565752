"""What is known of a request when it has ended: for the log, and for metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from fastserve.engine.completion import Completion

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
    adapter: str | None = None  # beside its model, that its model's name chooses
    first_turn_seconds: float | None = None  # by time.perf_counter, as is the arrival
    first_token_seconds: float | None = None
    finish_reasons: list[str] = field(default_factory=list)  # of the completions that have ended
    goes_on: bool = False  # behind its answer: its line is written by who ends it
    write: Callable[[], None] = field(default=_write_nothing)  # its line in the log

    def observe(self, completion: Completion) -> None:
        """A completion of it has ended."""
        self.finish_reasons.append(completion.finish_reason)
        turn_seconds = self.arrival_seconds + completion.queue_seconds
        self.first_turn_seconds = min(turn_seconds, self.first_turn_seconds or turn_seconds)
        if completion.completion_tokens:
            token_seconds = self.arrival_seconds + completion.time_to_first_token_seconds
            self.first_token_seconds = min(token_seconds, self.first_token_seconds or token_seconds)

    def attach(self, scope: Scope) -> None:
        scope[_KEY] = self

    @staticmethod
    def of(scope: Scope) -> RequestRecord:
        """The record of a request on its way."""
        record = scope[_KEY]
        assert isinstance(record, RequestRecord)
        return record
