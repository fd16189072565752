"""The tenants of a server, by name: what each may, and what it has had."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.engine.async_llm import AsyncLLM
from fastserve.errors import FastServeError, RateLimitError
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.key_file import ApiKey, Terms
from fastserve.serve.limiter import Admission, Limiter
from fastserve.serve.usage import TenantUsage

_PATIENCE_SECONDS = 2.0  # with engines in a long step, when weights have changed

logger = logging.getLogger(__name__)


class Tenant:
    """One of them; `anonymous` is whoever comes to a server without keys."""

    def __init__(self, name: str, terms: Terms, *, is_anonymous: bool = False) -> None:
        self.name = name
        self.is_anonymous = is_anonymous
        self.usage = TenantUsage()
        self._limiter = Limiter(name, terms)

    @property
    def terms(self) -> Terms:
        return self._limiter.terms

    @property
    def weight(self) -> float:
        weight = self.terms.weight
        return 1.0 if weight is None else weight

    @property
    def num_running(self) -> int:
        """Requests that run or wait."""
        return self._limiter.num_running

    def set_terms(self, terms: Terms) -> None:
        self._limiter.set_terms(terms)

    def enter(self, *, is_work: bool) -> None:
        """A request is at the door. See `Limiter.enter`."""
        with self._counting_refusals():
            self._limiter.enter(is_work=is_work)

    @contextmanager
    def admit(
        self, prompt_tokens: int, *, num_completions: int = 0, max_tokens: int | None = 0
    ) -> Iterator[Admission]:
        """A request that is under way within. See `Limiter.admit`."""
        work = self._limiter.admit(prompt_tokens, num_completions=num_completions, max_tokens=max_tokens)
        with ExitStack() as stack:
            with self._counting_refusals():
                admission = stack.enter_context(work)
            yield admission

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A request that waits for its model within. See `Limiter.waiting`."""
        with ExitStack() as stack:
            with self._counting_refusals():
                stack.enter_context(self._limiter.waiting())
            yield

    def describe(self, keys: Iterable[ApiKey]) -> dict[str, Any]:
        """Its terms, what is left of them, and its keys, which are these."""
        terms = self.terms
        return {
            "name": self.name,
            "weight": self.weight,
            "requests_per_minute": terms.requests_per_minute,
            "tokens_per_minute": terms.tokens_per_minute,
            "max_concurrent": terms.max_concurrent,
            "num_running": self.num_running,
            "requests_left": self._limiter.requests_left,
            "tokens_left": self._limiter.tokens_left,
            "keys": [
                {
                    "name": key.name,
                    "expires": None if key.expires is None else str(key.expires),
                    "has_expired": key.has_expired,
                }
                for key in keys
            ],
        }

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except RateLimitError as error:
            self.usage.refused[error.limit] += 1
            raise


class TenantTable:
    """Of all that have, or have had, a key; without keys there is one, to whom everybody belongs."""

    def __init__(self, keys: ApiKeys) -> None:
        self.keys = keys
        self._tenants: dict[str, Tenant] = {}
        self.anonymous = Tenant("anonymous", Terms(), is_anonymous=True)
        self._told: WeakKeyDictionary[AsyncLLM, Mapping[str, float]] = WeakKeyDictionary()
        self._reloading = asyncio.Lock()
        self._on_new_admin_key: list[Callable[[], None]] = []
        self._take_terms()

    def __iter__(self) -> Iterator[Tenant]:
        """All of them, those without keys too: what they have had is not forgotten."""
        return iter(self._tenants.values() if self._tenants else (self.anonymous,))

    def find(self, name: str) -> Tenant:
        """One that there is."""
        return self._tenants[name]

    @property
    def num_running(self) -> int:
        """Requests of all that run or wait."""
        return sum(tenant.num_running for tenant in self)

    def describe(self) -> list[dict[str, Any]]:
        """All of them, with their keys."""
        keys: dict[str, list[ApiKey]] = {}
        for key in self.keys.table.keys.values():
            keys.setdefault(key.tenant, []).append(key)
        return [tenant.describe(keys.get(tenant.name, ())) for tenant in self]

    async def reload(self, llms: Iterable[AsyncLLM]) -> None:
        """Read the files of keys again, if there are any, and have these engines share by their weights.
        Mistakes leave everything as it is.

        Raises:
            OptionError: see `ApiKeys.read`.
        """
        async with self._reloading:  # what was read last is taken last
            has_new_admin_key = self.keys.take(await asyncio.to_thread(self.keys.read))
            self._take_terms()
        if has_new_admin_key:
            for act in self._on_new_admin_key:
                act()
        # Who is in a long step takes them after it: keys are looked at meanwhile.
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self.tell_weights(llms)

    def on_new_admin_key(self, act: Callable[[], None]) -> None:
        """Have this done whenever another admin key takes the place of the old one."""
        self._on_new_admin_key.append(act)

    async def tell_weights(self, llms: Iterable[AsyncLLM]) -> None:
        """Have engines share by these tenants' weights, if they do not yet; who cannot is logged."""
        if not self._tenants:
            return
        for llm in llms:
            if self._told.get(llm) is self._weights:
                continue
            self._told[llm] = self._weights  # at once: whoever comes meanwhile is behind this in its queue
            try:
                await llm.set_tenant_weights(self._weights)
            except FastServeError as error:
                logger.warning("%s does not share by the weights of tenants: %s", llm.name, error)

    async def tell_weights_to(self, model: AsyncLLM | AsyncEncoder) -> None:
        """As `tell_weights`, to a model that was loaded just now."""
        if isinstance(model, AsyncLLM):
            await self.tell_weights([model])

    def _take_terms(self) -> None:
        terms = self.keys.table.terms
        for name, tenant in self._tenants.items():
            if name not in terms:
                tenant.set_terms(Terms())
        for name, own in terms.items():
            if name in self._tenants:
                self._tenants[name].set_terms(own)
            else:
                self._tenants[name] = Tenant(name, own)
        self._weights: Mapping[str, float] = {name: t.weight for name, t in self._tenants.items()}
