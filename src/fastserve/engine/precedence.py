"""The order in which sequences get turns: priority classes first, then tenants, then a policy's ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from operator import attrgetter

from fastserve.engine.policy.policy import Policy, rank
from fastserve.engine.sequence import Sequence
from fastserve.engine.tenant import Tenants
from fastserve.engine.turn import Turn


class Precedence:
    """A policy with classes and tenants put before it; towards a Round it stands for the policy.

    A better class goes first, always. Within a class, tenants go by what they have been served; within a
    tenant, the policy's ranks decide. With one class and one tenant the order, and whatever else is asked, is
    the policy's.

    Args:
        tenants: the accounts; None: tenants make no difference.
    """

    def __init__(self, policy: Policy, *, tenants: Tenants | None) -> None:
        self.policy = policy
        self._tenants = tenants
        self._num_in_class: Counter[int] = Counter()  # by class_index
        self._is_plain = True  # of the last order: it was the policy's

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def is_guarded(self) -> bool:
        return self.policy.is_guarded

    def set_policy(self, policy: Policy, sequences: Seq[Sequence], now: float) -> None:
        """Go on by another policy, from what every sequence has come to."""
        for sequence in sequences:
            self.policy.leave(sequence)
            policy.enter(sequence, now)
        self.policy = policy

    def enter(self, sequence: Sequence, now: float) -> None:
        self.policy.enter(sequence, now)
        self._num_in_class[sequence.class_index] += 1
        if self._tenants is not None:
            self._tenants.enter(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.policy.leave(sequence)
        self._num_in_class[sequence.class_index] -= 1
        if not self._num_in_class[sequence.class_index]:
            del self._num_in_class[sequence.class_index]
        if self._tenants is not None:
            self._tenants.leave(sequence)

    def serve(self, sequence: Sequence, seconds: float, now: float) -> None:
        self.policy.serve(sequence, seconds, now)
        if self._tenants is not None:
            self._tenants.charge(sequence)

    def refresh(self, sequences: Seq[Sequence], now: float) -> None:
        self.policy.refresh(sequences, now)

    def arrange(self, sequences: list[Sequence]) -> list[Sequence]:
        """Sequences, which are sorted here by their ranks, in the order of their turns."""
        sequences.sort(key=rank)
        tenants = self._tenants if self._tenants is not None and self._tenants.are_several else None
        self._is_plain = tenants is None and len(self._num_in_class) <= 1
        if self._is_plain:
            return sequences
        order = sequences if len(self._num_in_class) <= 1 else sorted(sequences, key=_class_index)
        if tenants is None:
            return order
        tenants.begin()
        if order is sequences:
            return tenants.interleave(sequences)
        arranged: list[Sequence] = []
        start = 0
        for _, num_in_class in sorted(self._num_in_class.items()):
            arranged += tenants.interleave(order[start : start + num_in_class])
            start += num_in_class
        return arranged

    def settle(self, turns: Seq[Turn]) -> None:
        """The turns of the order that was arranged last are made."""
        if self._tenants is not None:
            self._tenants.settle(turns)

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        """A better class takes the memory of a worse one; within a class the policy decides. The Round looks
        to it that nobody takes the memory of whom the order puts before them."""
        if better.class_index != resident.class_index:
            return better.class_index < resident.class_index
        return self.policy.outranks(better, resident)

    def departures(self, residents: Seq[Sequence], now: float) -> list[Sequence]:
        """By the policy's estimate, or, where classes or tenants have a part in the order, from its end."""
        return self.policy.departures(residents, now) if self._is_plain else list(reversed(residents))

    def check_invariants(self, sequences: Seq[Sequence]) -> None:
        """Assert that these sequences are those that have entered."""
        assert self._num_in_class == Counter(sequence.class_index for sequence in sequences)
        if self._tenants is not None:
            self._tenants.check_invariants(sequences)


_class_index = attrgetter("class_index")
