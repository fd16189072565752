"""What a scheduling policy is: a pure order of sequences, which sees neither tensors nor memory."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from operator import attrgetter
from typing import Protocol

from fastserve.engine.sequence import Sequence


class Policy(Protocol):
    """Ranks sequences. It owns the fields `rank` and `standing` of every sequence between `enter` and
    `leave`.

    Ranks of one policy can be compared; the lower goes first, and no two are equal. The scheduler gives turns
    in this order as far as rows and memory go.
    """

    @property
    def name(self) -> str: ...

    @property
    def is_guarded(self) -> bool:
        """Whether evictions in favour of better sequences are priced and rationed (see Guard)."""
        ...

    def enter(self, sequence: Sequence, now: float) -> None:
        """A sequence arrives, which ExpectedWork knows already, or comes from another policy with what it has
        computed so far."""
        ...

    def leave(self, sequence: Sequence) -> None:
        """It is finished, and `rank` and `standing` are no longer this policy's."""
        ...

    def serve(self, sequences: Seq[Sequence], seconds: float, now: float) -> None:
        """These had turns in a step that took so long; the tokens that it gives come after this."""
        ...

    def refresh(self, sequences: Seq[Sequence], now: float) -> None:
        """Bring up to date the ranks that change with time. Called before every step with all sequences."""
        ...

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        """Whether the first may take the memory of the second: it is better by a margin, so that two that are
        about as good do not change places again and again."""
        ...

    def level_of(self, sequence: Sequence) -> int:
        """Which of the policy's queues a sequence is in; 0 where there is one."""
        ...

    def departures(self, residents: Seq[Sequence], now: float) -> list[Sequence]:
        """Resident sequences in the order in which they should give up memory: whose next turn is farthest
        first."""
        ...


class RankedPolicy:
    """What most policies have in common. Their next turns come in the order of their ranks."""

    is_guarded = True

    def leave(self, sequence: Sequence) -> None:
        sequence.standing = None

    def serve(self, sequences: Seq[Sequence], seconds: float, now: float) -> None:
        pass

    def refresh(self, sequences: Seq[Sequence], now: float) -> None:
        pass

    def level_of(self, sequence: Sequence) -> int:
        return 0

    def departures(self, residents: Seq[Sequence], now: float) -> list[Sequence]:
        return sorted(residents, key=rank, reverse=True)


rank = attrgetter("rank")  # what sequences are sorted by
