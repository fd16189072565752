"""What each tenant has been served, and whose sequences are due: virtual token counters (Sheng et al., OSDI
2024, arXiv 2401.00588).

A tenant is *backlogged* in a step that leaves it wanting: a sequence of its has no turn, or a prompt is not
read to its end. Weighted service of two tenants that stay backlogged differs by no more than a bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Any

from fastserve.engine.sequence import Sequence

# Service of a token of a prompt, and of a completion: those of the paper, and about what people are charged.
PROMPT_TOKEN_SERVICE = 1.0
COMPLETION_TOKEN_SERVICE = 2.0
_RUN = 4  # sequences of one tenant that follow one another: who is ahead by them is behind in the next step
_MOST_IDLE = 4096  # tenants without sequences that are remembered


@dataclass(slots=True)
class Account:
    """Of a tenant that has sequences."""

    share: float  # what a unit of service is charged as: the inverse of the tenant's weight
    counter: float  # weighted service, since all accounts were last settled
    num_sequences: int = 0  # that are not finished
    next_counter: float = 0.0  # what the counter would be, had its sequences in the order so far their turns


class Tenants:
    """Puts sequences of several tenants in an order, those of the tenant that was served least first.

    - Service is charged as it is given: a token of a prompt once, however often it is computed, and not where
      it was found in the cache of prefixes; a token of a completion twice as much.
    - Who is not backlogged banks nothing: its counter is lifted to the smallest of those that are. A step
      that leaves nobody wanting settles all accounts.

    Args:
        weights: by tenant; others have 1. Of two backlogged tenants one with twice the weight gets twice the
            service.
        chunk_tokens: most tokens of one prompt in one step.
        most_turns: of one step: so many places of an order are filled from tenant to tenant.
    """

    def __init__(
        self, weights: Mapping[str, float] | None = None, *, chunk_tokens: int, most_turns: int
    ) -> None:
        self._weights = weights or {}
        self._chunk_tokens = chunk_tokens
        self._most_places = most_turns
        self._accounts: dict[str, Account] = {}
        self._idle: dict[
            str, float
        ] = {}  # counters of tenants without sequences that were ahead of the floor
        self._floor = 0.0  # the smallest counter of a backlogged tenant, as of the last step

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Charge by other weights from now on; what was charged stays as it is."""
        self._weights = weights
        for tenant, account in self._accounts.items():
            account.share = 1 / weights.get(tenant, 1.0)

    def counter(self, tenant: str) -> float:
        """Weighted service since accounts were last settled, or what a tenant that comes now begins with."""
        if tenant in self._accounts:
            return self._accounts[tenant].counter
        return max(self._idle.get(tenant, 0.0), self._floor)

    def enter(self, sequence: Sequence) -> None:
        account = self._accounts.get(sequence.tenant)
        if account is None:
            share = 1 / self._weights.get(sequence.tenant, 1.0)
            account = self._accounts[sequence.tenant] = Account(share, self.counter(sequence.tenant))
            self._idle.pop(sequence.tenant, None)
        account.num_sequences += 1

    def leave(self, sequence: Sequence) -> None:
        self.charge(sequence)
        account = self._accounts[sequence.tenant]
        account.num_sequences -= 1
        if account.num_sequences == 0:
            del self._accounts[sequence.tenant]
            if account.counter > self._floor:
                self._idle[sequence.tenant] = account.counter
                self._forget_some()

    def charge(self, sequence: Sequence) -> None:
        """Charge what the sequence has got since it was charged last. Before its first turn that is nothing:
        what it has computed then was found in the cache."""
        if not sequence.is_started:
            return
        num_prompt = sequence.num_prompt_tokens
        num_tokens = len(sequence.token_ids)
        charged = sequence.num_charged_tokens
        if charged >= num_prompt:
            service = COMPLETION_TOKEN_SERVICE * (num_tokens - charged)
        elif num_tokens > num_prompt:
            service = PROMPT_TOKEN_SERVICE * (num_prompt - charged)
            service += COMPLETION_TOKEN_SERVICE * (num_tokens - num_prompt)
        else:
            num_tokens = max(charged, min(sequence.num_computed_tokens, num_prompt))
            service = PROMPT_TOKEN_SERVICE * (num_tokens - charged)
        if service:
            sequence.num_charged_tokens = num_tokens
            account = self._accounts[sequence.tenant]
            account.counter += account.share * service

    def charge_all(self, sequences: Iterable[Sequence]) -> None:
        """As `charge`, quickly for those that decode; those that have left are charged already."""
        accounts = self._accounts
        for sequence in sequences:
            charged = sequence.num_charged_tokens
            if charged < sequence.num_prompt_tokens:
                self.charge(sequence)
            elif num_tokens := len(sequence.token_ids) - charged:
                sequence.num_charged_tokens = charged + num_tokens
                account = accounts[sequence.tenant]
                account.counter += account.share * COMPLETION_TOKEN_SERVICE * num_tokens

    def begin(self) -> None:
        """An order is to be made."""
        for account in self._accounts.values():
            account.next_counter = account.counter

    def interleave(self, queues: Mapping[str, list[Sequence]]) -> list[Sequence]:
        """Queues of tenants, each in the order of its ranks, as one: from the tenant of the smallest counter,
        which is raised by what its sequences so far will be charged in their turns; of equal ones, by rank.

        Beyond as many places as a step has turns, the queues follow one another: who is ahead by that is
        behind in the next step.
        """
        # Queues from a place on, with their tenants' counters. Ranks are never equal: no queues are compared.
        heap: list[tuple[float, Any, int, list[Sequence], Account]] = []
        for tenant, queue in queues.items():
            account = self._accounts[tenant]
            heap.append((account.next_counter, queue[0].rank, 0, queue, account))
        heapify(heap)
        order: list[Sequence] = []
        while len(heap) > 1 and len(order) < self._most_places:
            _, _, place, queue, account = heap[0]
            run = queue[place : place + _RUN]
            order += run
            account.next_counter += account.share * self._next_service(run)
            place += _RUN
            if place < len(queue):
                heapreplace(heap, (account.next_counter, queue[place].rank, place, queue, account))
            else:
                heappop(heap)
        for _, _, place, queue, _ in sorted(heap):
            order += queue[place:]
        return order

    def settle(self, wanting: Iterable[str]) -> None:
        """A step has left these tenants wanting, and its service is charged: lift the others. Who has got all
        that it wished for is owed nothing."""
        counters = [self._accounts[tenant].counter for tenant in wanting if tenant in self._accounts]
        if not counters:
            self._floor = 0.0
            self._idle.clear()
            for account in self._accounts.values():
                account.counter = 0.0
            return
        self._floor = floor = min(counters)  # those who want are not below it
        for account in self._accounts.values():
            account.counter = max(account.counter, floor)

    def check_invariants(self, sequences: Collection[Sequence]) -> None:
        """Assert that the accounts are those of these sequences."""
        num_sequences: dict[str, int] = {}
        for sequence in sequences:
            num_sequences[sequence.tenant] = num_sequences.get(sequence.tenant, 0) + 1
        assert num_sequences == {tenant: account.num_sequences for tenant, account in self._accounts.items()}
        assert not self._idle.keys() & self._accounts.keys()

    def _next_service(self, sequences: list[Sequence]) -> float:
        """What sequences are charged for their next turns, if they have them."""
        service = 0.0
        for sequence in sequences:
            num_tokens = len(sequence.token_ids) - sequence.num_computed_tokens
            if num_tokens == 1:
                service += COMPLETION_TOKEN_SERVICE
            else:
                service += PROMPT_TOKEN_SERVICE * min(num_tokens, self._chunk_tokens)
        return service

    def _forget_some(self) -> None:
        """Of very many idle tenants those who are not ahead any more, then the half that is least ahead."""
        if len(self._idle) <= _MOST_IDLE:
            return
        ahead = sorted((counter, tenant) for tenant, counter in self._idle.items() if counter > self._floor)
        if len(ahead) > _MOST_IDLE // 2:
            ahead = ahead[-_MOST_IDLE // 2 :]
        self._idle = {tenant: counter for counter, tenant in ahead}
