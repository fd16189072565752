"""What guesses at the next tokens of sequences: the seam between a Speculator and where drafts come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from fastserve.engine.cost import StepWork
from fastserve.engine.sequence import Sequence

LEAST_GAIN = 1.05  # in tokens a second, of a step with drafts: both sides are estimates
SEQUENCE_MEMORY = 30  # guesses
ENGINE_MEMORY = 300
_BEARABLE_DELAY = 0.005  # of a sequence's time, by drafts of others and by its own that come to nothing
_LEAST_WORTH = 0.7  # tokens for its seconds, of a draft, over those of a decode: less is not even considered

Guess = tuple[float, int]
"""A draft that may be made: the likelihood that it and all before it are right, and the place of its
sequence among the decodes of the step."""


@dataclass(slots=True)
class Account:
    """Of a sequence that decodes."""

    since_seconds: float  # by the Speculator's clock
    won_seconds: float = 0.0  # by drafts of its own, less the delays by all

    def slack_seconds(self, clock_seconds: float) -> float:
        """By how much it may yet be delayed."""
        return self.won_seconds + _BEARABLE_DELAY * (clock_seconds - self.since_seconds)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a step leaves to whoever guesses at its decodes."""

    worth: float  # likelihood at which a draft gives as many tokens for its seconds as a decode
    accounts: Seq[Account]  # of the decodes
    clock_seconds: float
    spare_seconds: Callable[[], float]  # by which the step may yet be made longer

    @property
    def least_likelihood(self) -> float:
        """Of a draft that is considered."""
        return _LEAST_WORTH * self.worth


class Guesser(Protocol):
    """Guesses, and learns from the tokens that come how often it is right."""

    @property
    def seconds(self) -> float:
        """What all its guesses, and all that they needed, have taken since the start."""
        ...

    def refresh(self, decodes: Seq[Sequence], work: StepWork, curve: Seq[float]) -> float:
        """Take note of what steps cost now. Returns the seconds of one more guess, where all have some.

        Args:
            work: of the decodes.
            curve: seconds of a step that verifies 0, 1, ... drafts beside them.
        """
        ...

    def look(self, decodes: Seq[Sequence], bounds: Bounds) -> list[Guess]:
        """The guesses that are likely enough to be considered, of each sequence one after the other. What it
        needs for that may take seconds, within the bounds, of which it charges those who have nothing of
        it."""
        ...

    def curve(self, decodes: Seq[Sequence], guesses: Seq[Guess]) -> list[float]:
        """Seconds that the first 0, 1, ... of these guesses take to be made."""
        ...

    def trial(self, decodes: Seq[Sequence], num_rows: int, bounds: Bounds) -> dict[int, int]:
        """Where no guess pays: how many to make all the same, by the place of their sequence, to learn from
        them; `num_rows` at most."""
        ...

    def guess(self, lengths: Mapping[int, int], decodes: Seq[Sequence]) -> dict[int, tuple[int, ...]]:
        """The next tokens by the place of their sequence, at most as many as `lengths` says."""
        ...

    def observe(self, seconds: float) -> None:
        """A step with decodes has taken so long, guesses included."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It is finished: free what is kept of it."""
        ...

    def check_invariants(self) -> None:
        """Assert that what it keeps is as the sequences say."""
        ...


def room_for_drafts(sequence: Sequence) -> int:
    """Drafts that a sequence may yet have: a step gives a token beyond those that are right, so that the last
    token of all is never drafted."""
    return sequence.max_length - len(sequence.token_ids) - 1
