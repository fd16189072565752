"""The models that a server knows, by all their names: their own, aliases, versions and the promoted one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

from fastserve.engine.async_llm import AsyncLLM
from fastserve.errors import FastServeError, ModelNotFoundError, OptionError
from fastserve.hub.name_table import NameTable, PinnedModel, split_version
from fastserve.hub.registry import Registry
from fastserve.serve.model_entry import ModelEntry, ServedModel
from fastserve.serve.model_memory import ModelMemory

logger = logging.getLogger(__name__)


class ModelTable:
    """Finds a model by the name that a request has. What the store says of names is read again when it has
    changed: a version that is promoted answers from the next request on, and one that was removed and made
    anew is another model.

    Args:
        memory: of the models' entries.
        registry: whose aliases and versions count; None: there are none.
        bases: names whose versions are all served, those to come too.
        versions: of other names, that are served.
        make_version: makes the entry of one.

    Raises:
        OptionError: there are no models, or two of one name.
    """

    def __init__(
        self,
        memory: ModelMemory,
        *,
        registry: Registry | None = None,
        bases: Seq[str] = (),
        versions: Seq[str] = (),
        make_version: Callable[[str], ModelEntry] | None = None,
    ) -> None:
        self.memory = memory
        self.created = int(time.time())
        self._entries = {entry.name: entry for entry in memory.entries}
        self._registry = registry
        self._bases = bases
        self._versions = versions
        self._make_version = make_version
        self._names = NameTable()
        self._stamp: object = None  # of where the store has them
        self._origins: dict[str, PinnedModel | None] = {}  # what versions were when their entries were made
        if not memory.entries:
            raise OptionError("there is no model to serve", hint="name at least one")
        if len(self._entries) < len(memory.entries):
            names = ", ".join(entry.name for entry in memory.entries)
            raise OptionError(f"two models have one name: {names}", hint="serve each of them once")
        self.refresh()

    @classmethod
    def of_loaded(cls, models: Seq[ServedModel]) -> ModelTable:
        """Of models that are loaded, and stay."""
        return cls(ModelMemory(map(ModelEntry.of, models)))

    def __iter__(self) -> Iterator[ServedModel]:
        """Those that are loaded."""
        return (entry.model for entry in self.entries if entry.is_open and entry.model is not None)

    @property
    def entries(self) -> Seq[ModelEntry]:
        return tuple(self._entries.values())

    @property
    def generators(self) -> list[AsyncLLM]:
        """Those that are loaded and generate text."""
        return [model for model in self if isinstance(model, AsyncLLM)]

    def refresh(self) -> None:
        """Read what the store says of names again, if it has changed. A table of names that cannot be read
        changes nothing."""
        if self._registry is None:
            return
        stamp = [_stamp_of(path) for path in (NameTable.path(self._registry.home), self._registry.folder)]
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._names = self._registry.names()
        except FastServeError as error:
            logger.warning("aliases and versions stay as they were: %s", error)
            return
        for base in self._bases:
            versions = self._registry.versions_of(base, self._names)
            removed = [e for e in self.entries if e.base == base and e.version not in (None, *versions)]
            for entry in removed:
                del self._entries[entry.name]
                self._origins.pop(entry.name, None)
                self.memory.forget(entry)
            for version in versions:
                if f"{base}@{version}" not in self._entries:
                    self._add(f"{base}@{version}")
        for entry in self.entries:
            origin = self._origin_of(entry)
            if origin is not None and self._origins.setdefault(entry.name, origin) != origin:
                self._origins[entry.name] = origin
                self._add(entry.name, is_pinned=entry.is_pinned, policy=entry.policy)
                self.memory.forget(entry)

    def _add(self, name: str, *, is_pinned: bool = False, policy: str | None = None) -> None:
        """A version that has come, or one that was made anew, in the place of the old one."""
        assert self._make_version is not None
        entry = self._entries[name] = self._make_version(name)
        entry.is_pinned, entry.policy = is_pinned, policy
        self.memory.add(entry)

    def _origin_of(self, entry: ModelEntry) -> PinnedModel | None:
        """What a version of the store is now; None where there is none."""
        is_version = entry.base in self._bases or entry.name in self._versions
        if entry.version is None or not is_version or self._registry is None:
            return None
        if (pinned := self._names.pinned(entry.name)) is not None:
            return pinned
        record = self._registry.find(entry.name)
        return None if record is None else PinnedModel(record.name, record.digest)

    def find(self, name: str) -> ModelEntry:
        """
        Raises:
            ModelNotFoundError: there is none of that name; it says which there are.
        """
        self.refresh()
        entry = self._lookup(name)
        if entry is not None:
            return entry
        base, version = split_version(name)
        versions = [e.version for e in self.entries if e.base == base and e.version is not None]
        if versions:
            known = ", ".join(f"{base}@{known}" for known in versions)
            raise ModelNotFoundError(
                f"no version of {base!r} is promoted"
                if version is None
                else f"the model {base[:100]!r} has no version {version[:100]!r}",
                hint=f"this server has {known}",
            )
        raise ModelNotFoundError(
            f"there is no model {name[:100]!r}", hint=f"this server has {', '.join(self.names())}"
        )

    def find_with_adapter(self, name: str) -> tuple[ModelEntry, str | None]:
        """The model of a name that may be MODEL:ADAPTER, and the adapter's name. A model that has just this
        name goes before.

        Raises:
            ModelNotFoundError: there is no such model, or it has no such adapter; it says which there are.
        """
        self.refresh()
        base, colon, adapter = name.rpartition(":")
        own = self._lookup(name)
        if own is not None or not colon or self._lookup(base) is None:
            return self.find(name), None
        entry = self.find(base)
        if adapter not in entry.adapters:
            known = ", ".join(f"{base}:{known}" for known in entry.adapters)
            raise ModelNotFoundError(
                f"the model {base[:100]!r} has no adapter {adapter[:100]!r}",
                hint=f"this server has {known}" if known else "it has none",
            )
        return entry, adapter

    def names(self) -> list[str]:
        """All names that a request may have: those of the models, then what stands for them, then both with
        their adapters."""
        return [*self._entries, *self.further_names(), *self.adapter_names()]

    def adapter_names(self) -> dict[str, tuple[str, ModelEntry]]:
        """MODEL:ADAPTER of all that there are, by every name of the model, which is given with each."""
        named = {**self._entries, **self.further_names()}
        found = (
            (f"{name}:{adapter}", (name, entry))
            for name, entry in named.items()
            for adapter in entry.adapters
        )
        return {name: pair for name, pair in found if name not in named}

    def further_names(self) -> dict[str, ModelEntry]:
        """Aliases, and names whose promoted version is served."""
        self.refresh()
        names = (*self._names.promoted, *self._names.aliases)
        found = ((name, self._lookup(name)) for name in names if name not in self._entries)
        return {name: entry for name, entry in found if entry is not None}

    def set_up(self) -> None:
        """Reckon what all models take, and load those that are pinned, or all where there is no budget but
        versions that nobody has promoted. It takes long, and is for the start.

        Raises:
            ModelMemoryError: one does not fit.
            As `plan_model` and `load_model`.
        """
        for entry in self.entries:
            if entry.plan is None and entry.opener is not None:
                entry.plan = entry.opener.plan()
        for entry in self.entries:
            self.memory.check_fit(entry)
        for entry in self._first():
            if entry.model is None and entry.opener is not None and entry.plan is not None:
                entry.set_loaded(entry.opener.open(entry.plan))

    async def close(self) -> None:
        """Stop them all. Whatever is still streaming ends with an error."""
        await self.memory.close()

    def _lookup(self, name: str) -> ModelEntry | None:
        if name in self._entries:
            return self._entries[name]
        try:
            end = self._names.follow(name)
        except OptionError:  # an alias of itself
            return None
        if end == name:
            return None
        # The store's names have no case.
        return next((entry for key, entry in self._entries.items() if key.lower() == end.lower()), None)

    def _first(self) -> list[ModelEntry]:
        if self.memory.budget_bytes is not None:
            return [entry for entry in self.entries if entry.is_pinned]
        promoted = {f"{base}@{self._names.promoted.get(base)}" for base in self._bases}
        return [e for e in self.entries if e.base not in self._bases or e.name in promoted]


def _stamp_of(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
