"""A request as a scheduler meets it, and the processes by which requests arrive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastserve.types import Float64Array

PREFIX_TOKENS = 512  # that one prefix id stands for


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """When a request comes, and how long its prompt and its completion are.

    Attributes:
        arrival_seconds: since the start of the run.
        tenant: or endpoint, whose requests resemble each other.
        prefix_ids: of the prompt's pieces of PREFIX_TOKENS tokens each, the last one as long as is left;
            prompts that begin with the same ids begin with the same tokens. Empty: it has nothing in common
            with others.
    """

    arrival_seconds: float
    prompt_tokens: int
    completion_tokens: int
    tenant: str = ""
    prefix_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def prompt_ids(self, own_id: int) -> list[int]:
        """The tokens of its prompt: equal where prefix ids are equal, else `own_id`, which no other has.

        >>> Arrival(arrival_seconds=0, prompt_tokens=3, completion_tokens=1).prompt_ids(7)
        [7, 7, 7]
        """
        if not self.prefix_ids:
            return [own_id] * self.prompt_tokens
        ids = [~prefix_id for prefix_id in self.prefix_ids for _ in range(PREFIX_TOKENS)]
        del ids[self.prompt_tokens :]
        return ids + [own_id] * (self.prompt_tokens - len(ids))


def gamma_gaps(rng: np.random.Generator, num_gaps: int, *, rate: float, cv: float = 1.0) -> Float64Array:
    """Seconds between arrivals of a renewal process; a Poisson process with a coefficient of variation of 1.

    >>> gaps = gamma_gaps(np.random.default_rng(0), 100_000, rate=4.0, cv=2.0)
    >>> round(float(gaps.mean()), 2), round(float(gaps.std() / gaps.mean()), 1)
    (0.25, 2.0)

    Args:
        rate: arrivals per second.
        cv: standard deviation of a gap over its mean.
    """
    shape = 1 / cv**2
    return rng.gamma(shape, 1 / (shape * rate), num_gaps)
