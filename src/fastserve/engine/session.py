"""Sessions: the requests of one program, such as an agent, charged together (Autellix, arXiv 2502.13965)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from fastserve.engine.sequence import Sequence

_MOST_SESSIONS = 16384


@dataclass(slots=True)
class Session:
    """What its requests have come to together."""

    attained_seconds: float = 0.0  # of the steps in which any of its sequences had a turn, each counted
    last_used_seconds: float = 0.0
    num_live: int = 0  # sequences that are not finished


class Sessions:
    """Remembers what each session has attained. A sequence begins with that, so that to a policy which looks
    at attained service the tenth call of a program is no newcomer.

    A session belongs to its tenant: two tenants that use the same name have two.

    Args:
        idle_seconds: a session without requests for so long is forgotten.
        most: sessions that are remembered, besides those that have requests; the longest unused go first.
    """

    def __init__(self, *, idle_seconds: float, most: int = _MOST_SESSIONS) -> None:
        self._idle_seconds = idle_seconds
        self._most = most
        # By tenant and name, the one that was used last at the end.
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def enter(self, sequence: Sequence, now: float) -> None:
        """A sequence of a session comes: it inherits what the session has attained."""
        self._forget(now)
        key = sequence.tenant, sequence.session
        session = self._sessions.setdefault(key, Session())
        self._sessions.move_to_end(key)
        session.num_live += 1
        session.last_used_seconds = now
        sequence.inherited_seconds = session.attained_seconds

    def serve(self, sequence: Sequence, seconds: float, now: float) -> None:
        """It had a turn in a step that took so long."""
        key = sequence.tenant, sequence.session
        session = self._sessions[key]
        self._sessions.move_to_end(key)
        session.attained_seconds += seconds
        session.last_used_seconds = now

    def leave(self, sequence: Sequence) -> None:
        self._sessions[sequence.tenant, sequence.session].num_live -= 1

    def _forget(self, now: float) -> None:
        """Sessions that have been idle for too long, or are too many."""
        for _ in range(len(self._sessions)):
            key, session = next(iter(self._sessions.items()))
            is_idle = session.last_used_seconds < now - self._idle_seconds
            if not is_idle and len(self._sessions) <= self._most:
                return
            if session.num_live:
                self._sessions.move_to_end(key)
            else:
                del self._sessions[key]
