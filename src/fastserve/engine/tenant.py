"""What each tenant has been served, and whose sequences are due: virtual token counters (Sheng et al., OSDI
2024, arXiv 2401.00588).

A tenant is *backlogged* in a step that leaves it wanting: a sequence of its without a turn, or a prompt that
is not read to its end. Between two tenants that stay backlogged, weighted service differs by a bound that
does not grow with time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastserve.engine.sequence import Sequence
from fastserve.engine.turn import Turn

# Service of a token of a prompt, and of a completion: those of the paper, and about what people are charged.
PROMPT_TOKEN_SERVICE = 1.0
COMPLETION_TOKEN_SERVICE = 2.0
_MOST_IDLE = 4096  # tenants without sequences that are remembered


@dataclass(slots=True)
class Account:
    """One tenant's."""

    share: float  # what a unit of service is charged as: the inverse of the tenant's weight
    counter: float  # weighted service, since all accounts were last settled
    num_live: int = 0  # sequences that are not finished
    num_wanting: int = 0  # of them, that could use a turn in this step and have none, or not enough
    next_counter: float = 0.0  # what the counter would be, had its sequences in the order so far their turns


class Tenants:
    """Puts sequences of several tenants in an order, those of the tenant that was served least first.

    - Service is charged as it is given: a token of a prompt once, however often it is computed, and not where
      it was found in the cache of prefixes; a token of a completion twice as much.
    - Who is not backlogged banks nothing: its counter is lifted to the smallest of those that are. A step
      that
      leaves nobody wanting settles all accounts.

    Args:
        weights: by tenant; others have 1. Of two backlogged tenants one with twice the weight gets twice the
            service.
        chunk_tokens: most tokens of one prompt in one step.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, *, chunk_tokens: int) -> None:
        self._weights = weights or {}
        self._chunk_tokens = chunk_tokens
        self._accounts: dict[str, Account] = {}
        self._floor = 0.0  # the smallest counter of a backlogged tenant, as of the last step
        self._num_live = 0  # tenants with sequences

    @property
    def are_several(self) -> bool:
        """Whether more than one has sequences that are not finished."""
        return self._num_live > 1

    def counter(self, tenant: str) -> float:
        """Weighted service since accounts were last settled, or what a tenant that comes now begins with."""
        account = self._accounts.get(tenant)
        return self._floor if account is None else max(account.counter, self._floor)

    def enter(self, sequence: Sequence) -> None:
        account = self._accounts.get(sequence.tenant)
        if account is None:
            self._forget_some()
            share = 1 / self._weights.get(sequence.tenant, 1.0)
            account = self._accounts[sequence.tenant] = Account(share, self._floor)
        if account.num_live == 0:
            account.counter = max(account.counter, self._floor)
            self._num_live += 1
        account.num_live += 1

    def leave(self, sequence: Sequence) -> None:
        self.charge(sequence)
        account = self._accounts[sequence.tenant]
        account.num_live -= 1
        if account.num_live == 0:
            self._num_live -= 1
            if account.counter <= self._floor:
                del self._accounts[sequence.tenant]

    def charge(self, sequence: Sequence) -> None:
        """Charge what the sequence has got since it was charged last."""
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

    def begin(self) -> None:
        """A step is to be made."""
        for account in self._accounts.values():
            account.next_counter = account.counter
            account.num_wanting = 0

    def interleave(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Sequences in the order of their ranks, put in that of the tenants' counters, each raised by the
        turns of its sequences so far. Within a tenant the order stays; between `begin` and `settle` no
        sequence comes twice."""
        sequences = list(sequences)
        accounts, chunk_tokens = self._accounts, self._chunk_tokens
        counters = []
        for sequence in sequences:
            account = accounts[sequence.tenant]
            counters.append(account.next_counter)
            if sequence.is_held:
                continue
            account.num_wanting += 1
            num_tokens = len(sequence.token_ids) - sequence.num_computed_tokens
            if num_tokens == 1:
                account.next_counter += account.share * COMPLETION_TOKEN_SERVICE
            else:
                num_tokens = num_tokens if num_tokens < chunk_tokens else chunk_tokens
                account.next_counter += account.share * PROMPT_TOKEN_SERVICE * num_tokens
        places = sorted(range(len(sequences)), key=counters.__getitem__)
        return [sequences[place] for place in places]

    def settle(self, turns: Seq[Turn]) -> None:
        """The step's turns are made: see who is left wanting, and lift the others."""
        accounts = self._accounts
        if self._num_live <= 1:  # nobody has counted
            for account in accounts.values():
                account.num_wanting = account.num_live
        for turn in turns:
            if turn.outputs:
                accounts[turn.sequence.tenant].num_wanting -= 1
        floor = min((a.counter for a in accounts.values() if a.num_wanting > 0), default=None)
        if floor is None:
            self._settle_all()
            return
        self._floor = floor
        for name, account in list(accounts.items()):
            if account.num_wanting <= 0 and account.counter <= floor:
                account.counter = floor
                if not account.num_live:
                    del accounts[name]

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the accounts are those of these sequences, and of tenants that had more than their
        share."""
        num_live: dict[str, int] = {}
        for sequence in sequences:
            num_live[sequence.tenant] = num_live.get(sequence.tenant, 0) + 1
        assert num_live == {name: a.num_live for name, a in self._accounts.items() if a.num_live}
        assert self._num_live == len(num_live)
        assert all(account.counter >= 0 for account in self._accounts.values())

    def _settle_all(self) -> None:
        self._floor = 0.0
        self._accounts = {name: account for name, account in self._accounts.items() if account.num_live}
        for account in self._accounts.values():
            account.counter = 0.0

    def _forget_some(self) -> None:
        """Of very many idle tenants, the half that is least ahead of the others."""
        if len(self._accounts) - self._num_live <= _MOST_IDLE:
            return
        idle = sorted((a.counter, name) for name, a in self._accounts.items() if not a.num_live)
        for _, name in idle[: len(idle) // 2]:
            del self._accounts[name]
