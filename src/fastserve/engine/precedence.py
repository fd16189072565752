"""The order in which sequences get turns: priority classes first, then tenants, then a policy's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import chain
from operator import attrgetter

from fastserve.engine.policy.policy import Policy, rank
from fastserve.engine.sequence import Sequence
from fastserve.engine.tenant import Tenants
from fastserve.engine.turn import Turn


class Precedence:
    """A policy with classes and tenants put before it; towards a Round it stands for the policy.

    A better class goes first, always. Within a class, tenants go by what they have been served. Within a
    tenant the policy's ranks decide, except that streams which have been paused for long enough go first,
    as they came, and who cannot be in time last. With one class, one tenant and neither of these the order,
    and whatever else is asked, is the policy's.

    Args:
        tenants: the accounts; None: tenants make no difference.
    """

    def __init__(self, policy: Policy, *, tenants: Tenants | None) -> None:
        self.policy = policy
        self._tenants = tenants
        # By class_index and tenant, none of them empty; all are of one tenant where there are no accounts.
        self._queues: dict[int, dict[str, list[Sequence]]] = {}
        self._is_plain = True  # of the last order: it was the policy's
        self.has_exceptions = False  # whether some may be insistent or relegated
        self._wanting: set[str] = set()  # tenants that the last step left wanting

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

    def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        """Go on by other weights of tenants; without accounts these make no difference."""
        if self._tenants is not None:
            self._tenants.set_weights(weights)

    def enter(self, sequence: Sequence, now: float) -> None:
        self.policy.enter(sequence, now)
        queues = self._queues.setdefault(sequence.class_index, {})
        queues.setdefault(self._tenant_of(sequence), []).append(sequence)
        if self._tenants is not None:
            self._tenants.enter(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.policy.leave(sequence)
        queues, tenant = self._queues[sequence.class_index], self._tenant_of(sequence)
        queues[tenant].remove(sequence)
        if not queues[tenant]:
            del queues[tenant]
        if not queues:
            del self._queues[sequence.class_index]
        if self._tenants is not None:
            self._tenants.leave(sequence)

    def serve(self, sequences: Seq[Sequence], seconds: float, now: float) -> None:
        self.policy.serve(sequences, seconds, now)

    def charge(self, sequences: Seq[Sequence]) -> None:
        """These had turns in the last step, and their tokens have come: charge their tenants."""
        if self._tenants is not None:
            self._tenants.charge_all(sequences)
            self._tenants.settle(self._wanting)

    def refresh(self, sequences: Seq[Sequence], now: float) -> None:
        self.policy.refresh(sequences, now)

    def arrange(self) -> list[Sequence]:
        """All sequences in the order of their turns."""
        classes = [queues for _, queues in sorted(self._queues.items())]
        for queues in classes:
            for queue in queues.values():
                queue.sort(key=rank)
                if self.has_exceptions:
                    _except(queue)
        is_one = len(classes) <= 1 and all(len(queues) == 1 for queues in classes)
        self._is_plain = is_one and not self.has_exceptions
        if self._tenants is None or all(len(queues) == 1 for queues in classes):
            order = [queue for queues in classes for queue in queues.values()]
            return order[0] if len(order) == 1 else list(chain.from_iterable(order))
        self._tenants.begin()
        return list(chain.from_iterable(map(self._tenants.interleave, classes)))

    def note(self, turns: Seq[Turn]) -> None:
        """These are the turns of the order that was arranged last: remember whose wishes they leave open."""
        if self._tenants is not None:
            served = {turn.sequence.sequence_id for turn in turns if turn.outputs}
            self._wanting = {
                tenant
                for queues in self._queues.values()
                for tenant, queue in queues.items()
                if any(not s.is_held and s.sequence_id not in served for s in reversed(queue))
            }

    def outranks(self, better: Sequence, resident: Sequence) -> bool:
        """A better class takes the memory of a worse one, and within a tenant who can be in time that of who
        cannot; nobody that of a stream which is not to be paused again; else the policy decides."""
        if better.class_index != resident.class_index:
            return better.class_index < resident.class_index
        if better.is_relegated or (resident.is_insistent and not resident.is_relegated):
            return False
        if resident.is_relegated and better.tenant == resident.tenant:
            return True
        return self.policy.outranks(better, resident)

    def level_of(self, sequence: Sequence) -> int:
        return self.policy.level_of(sequence)

    def departures(self, residents: Seq[Sequence], now: float) -> list[Sequence]:
        """By the policy's estimate, or, where classes or tenants have a part in the order, from its end."""
        return self.policy.departures(residents, now) if self._is_plain else list(reversed(residents))

    def check_invariants(self, sequences: Seq[Sequence]) -> None:
        """Assert that these sequences are those that have entered."""
        queued = {
            (class_index, tenant, sequence.sequence_id)
            for class_index, queues in self._queues.items()
            for tenant, queue in queues.items()
            for sequence in queue
        }
        assert queued == {(s.class_index, self._tenant_of(s), s.sequence_id) for s in sequences}
        if self._tenants is not None:
            self._tenants.check_invariants(sequences)

    def _tenant_of(self, sequence: Sequence) -> str:
        return "" if self._tenants is None else sequence.tenant


def _except(queue: list[Sequence]) -> None:
    """Put those first that have been paused for long enough, as they came, and those last that are late."""
    late = [sequence for sequence in queue if sequence.is_relegated]
    first = [sequence for sequence in queue if sequence.is_insistent and not sequence.is_relegated]
    if late or first:
        first.sort(key=arrival)
        others = [sequence for sequence in queue if not (sequence.is_insistent or sequence.is_relegated)]
        queue[:] = first + others + late


arrival = attrgetter("arrival_seconds", "sequence_id")
