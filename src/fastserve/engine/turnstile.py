"""Engines of one process take turns at its cores, step by step: first come, first served."""

from __future__ import annotations

from collections import deque
from threading import Lock


class Turnstile:
    """Lets one thread through at a time, in the order in which they come.

    Several engines share the cores so: each step has all of them, and an engine that comes again waits behind
    those that wait already. Two that always have work alternate.

    >>> turnstile = Turnstile()
    >>> with turnstile:
    ...     pass  # a step
    """

    def __init__(self) -> None:
        self._lock = Lock()  # of what follows; held for moments
        self._is_taken = False
        self._waiting: deque[Lock] = deque()  # held, each by who waits for it to be released

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def __enter__(self) -> None:
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            place = Lock()
            place.acquire()
            self._waiting.append(place)
        place.acquire()  # the turn is handed over: nobody who comes meanwhile can take it

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False
