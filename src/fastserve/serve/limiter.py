"""What one tenant may do now: its rates, by token buckets, and how many of its requests are under way.

Who is over a rate is refused as early as can be, so that it costs the others next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

from fastserve.errors import RateLimitError
from fastserve.serve.key_file import Terms

_FIRST_COMPLETION_TOKENS = 256.0  # that a completion is expected to have, as long as none has ended
_MEMORY = 0.9  # of the mean over completions: the last ten or so count


class TokenBucket:
    """Holds a minute's amount at most, and fills by that in a minute. It may be overdrawn.

    >>> bucket = TokenBucket(60, now=0.0)
    >>> bucket.take(60, now=0.0)
    >>> bucket.seconds_until(2, now=0.5)
    1.5
    """

    def __init__(self, per_minute: float, *, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled_seconds = now

    def level(self, now: float) -> float:
        filled = self._level + (now - self._filled_seconds) * self.per_minute / 60
        self._level, self._filled_seconds = min(filled, self.per_minute), now
        return self._level

    def seconds_until(self, amount: float, now: float) -> float:
        """How long until it holds so much, or is full."""
        missing = min(amount, self.per_minute) - self.level(now)
        return max(0.0, missing) * 60 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount

    def give_back(self, amount: float, now: float) -> None:
        self._level = min(self.level(now) + amount, self.per_minute)


@dataclass(slots=True)
class Admission:
    """A request that is under way, until `Limiter.admit` is left."""

    used_tokens: int = 0  # of its prompts and completions


class Limiter:
    """Of one tenant.

    A request is counted at the door. Where it asks for work, the tokens that it may take are set aside when
    its prompt is known, and those that it has not used come back when it has ended. One that may take more
    than a minute's tokens is let in when the bucket is full, and overdraws it.

    Args:
        clock: seconds.
    """

    def __init__(self, tenant: str, terms: Terms, *, clock: Callable[[], float] = monotonic) -> None:
        self._tenant = tenant
        self._clock = clock
        self.terms = Terms()
        self.num_running = 0
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self._completion_tokens = _FIRST_COMPLETION_TOKENS  # expected of a completion
        self.set_terms(terms)

    def set_terms(self, terms: Terms) -> None:
        """Go on by other terms; a rate that stays the same keeps its bucket."""
        now = self._clock()
        self._requests = _bucket(self._requests, terms.requests_per_minute, now)
        self._tokens = _bucket(self._tokens, terms.tokens_per_minute, now)
        self.terms = terms

    @property
    def requests_left(self) -> int | None:
        """How many may come now; None: there is no limit."""
        return None if self._requests is None else max(0, int(self._requests.level(self._clock())))

    @property
    def tokens_left(self) -> int | None:
        return None if self._tokens is None else max(0, int(self._tokens.level(self._clock())))

    def enter(self, *, is_work: bool) -> None:
        """A request is at the door.

        Args:
            is_work: it asks for what `admit` is for.

        Raises:
            RateLimitError: it is one too many, or there are no tokens left for any work.
        """
        now = self._clock()
        if is_work:
            self._check_running()
            self._check_left("tokens_per_minute", self._tokens, now)
        self._check_left("requests_per_minute", self._requests, now)
        if self._requests is not None:
            self._requests.take(1, now)

    @contextmanager
    def admit(
        self, prompt_tokens: int, *, num_completions: int = 0, max_tokens: int | None = 0
    ) -> Iterator[Admission]:
        """A request that is under way within.

        Args:
            max_tokens: of a completion; None: nobody knows, and what others had of late is expected.

        Raises:
            RateLimitError: it is one too many, or may take more tokens than are left.
        """
        self._check_running()
        each = self._completion_tokens if max_tokens is None else max_tokens
        reserved = prompt_tokens + num_completions * each
        self._check_tokens(reserved, self._clock())
        bucket = self._tokens
        if bucket is not None:
            bucket.take(reserved, self._clock())
        self.num_running += 1
        admission = Admission()
        try:
            yield admission
        finally:
            self.num_running -= 1
            if bucket is not None:
                bucket.give_back(reserved - admission.used_tokens, self._clock())
            if num_completions and admission.used_tokens >= prompt_tokens:
                had = (admission.used_tokens - prompt_tokens) / num_completions
                self._completion_tokens = _MEMORY * self._completion_tokens + (1 - _MEMORY) * had

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A request that waits for its model within, before `admit`: it is under way, too.

        Raises:
            RateLimitError: it is one too many.
        """
        self._check_running()
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    def _check_running(self) -> None:
        most = self.terms.max_concurrent
        if most is not None and self.num_running >= most:
            text = f"{self.num_running} of its requests are under way; max_concurrent is {most}"
            raise self._error("max_concurrent", text, 1.0)

    def _check_left(self, limit: str, bucket: TokenBucket | None, now: float) -> None:
        """That there is one left at least, which is what any request takes."""
        seconds = 0.0 if bucket is None else bucket.seconds_until(1, now)
        if seconds:
            raise self._error(limit, f"{limit} is {getattr(self.terms, limit)}, and used up", seconds)

    def _check_tokens(self, wanted: float, now: float) -> None:
        if self._tokens is None:
            return
        seconds = self._tokens.seconds_until(wanted, now)
        if seconds:
            limit, left = "tokens_per_minute", max(0, int(self._tokens.level(now)))
            text = f"{limit} is {self.terms.tokens_per_minute}, of which {left} are left"
            raise self._error(limit, f"{text}; {wanted:.0f} are asked for", seconds)

    def _error(self, limit: str, text: str, seconds: float) -> RateLimitError:
        return RateLimitError(f"of tenant {self._tenant!r} {text}", limit=limit, retry_after_seconds=seconds)


def _bucket(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    return (
        bucket if bucket is not None and bucket.per_minute == per_minute else TokenBucket(per_minute, now=now)
    )
