"""Opens models for serving, whichever kind they are, and finds what the names on a command line mean."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastserve.checkpoint.checked_tensors import Check
from fastserve.config import EngineOptions
from fastserve.engine.adapter_table import check_name
from fastserve.engine.async_encoder import AsyncEncoder
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.engine_of_model import resolve_draft
from fastserve.engine.load import load_model, plan_model
from fastserve.engine.loaded_model import ModelPlan
from fastserve.engine.turnstile import Turnstile
from fastserve.errors import ContextLengthError, ModelNotFoundError, OptionError
from fastserve.hub.folder_source import is_model
from fastserve.hub.name_table import split_version
from fastserve.hub.progress import Progress
from fastserve.hub.registry import Registry
from fastserve.hub.resolve import resolve
from fastserve.serve.model_entry import ModelEntry, ServedModel
from fastserve.serve.model_memory import ModelMemory
from fastserve.serve.model_table import ModelTable
from fastserve.serve.options import ServeOptions


def open_model(
    path: Path,
    options: EngineOptions,
    *,
    name: str,
    offline: bool = False,
    turnstile: Turnstile | None = None,
    check: Check | None = None,
) -> ServedModel:
    """Load the model in a folder or .gguf file, whatever its task. `check` and errors are those of
    `load_model`."""
    options = resolve_draft(options, offline=offline)
    model = load_model(path, options, name=name, check=check)
    if model.task == "generate":
        return AsyncLLM(model, options, name=name, turnstile=turnstile)
    return AsyncEncoder(
        model, name=name, options=options, max_waiting=options.max_waiting, turnstile=turnstile
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOpener:
    """Opens a model by its name or path, the same way each time. See `fastserve.serve.model_entry.Opener`.

    Args:
        name: by which it is served.
        text: its name or path for `resolve`, which is asked again each time.
        turnstile: that all models of the server share.
        adapters: folders of those beside it, by name, as they are when it is opened.
        budget_bytes: of all models together: what options leave open is a part of that. None: of what the
            machine has at the time.
        is_alone: no other model is served; else one that was made for less than the options' context has its
            own.
    """

    name: str
    text: str
    options: EngineOptions
    turnstile: Turnstile
    budget_bytes: int | None
    adapters: Mapping[str, Path]
    is_alone: bool = True

    def plan(self) -> ModelPlan:
        options = resolve_draft(self._own_options(), offline=True)
        path = resolve(self.text, offline=True)
        reckon = partial(plan_model, path, name=self.name, available_bytes=self.budget_bytes)
        try:
            return reckon(options)
        except ContextLengthError:
            if self.is_alone:
                raise
        return reckon(replace(options, context_length=None))

    def open(self, plan: ModelPlan, check: Check | None = None) -> ServedModel:
        options = self._own_options()
        if options.context_length is not None:
            options = replace(options, context_length=plan.context_length)
        if self.budget_bytes is not None and plan.kv_bytes:
            options = replace(options, kv_memory=plan.kv_bytes)
        path = resolve(self.text, offline=True)
        return open_model(path, options, name=self.name, offline=True, turnstile=self.turnstile, check=check)

    def _own_options(self) -> EngineOptions:
        """With the adapters of this model alone; others have as much room for such as are loaded later."""
        return replace(
            self.options, adapters=dict(self.adapters), max_adapters=self.options.num_adapter_slots
        )


def find_models(
    texts: Seq[str],
    serve_options: ServeOptions,
    options: EngineOptions,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> ModelTable:
    """The models that are to be served, known but not loaded: see `ModelTable.set_up`. What is not here is
    downloaded.

    A name that has versions stands for all of them, an alias for what it stands for now.

    An adapter's name is `MODEL:NAME`, with the name by which its model is served, or that without a version;
    of a single model `NAME`.

    Raises:
        OptionError: two have one name, or a pinned one is none of them, or no model has an adapter's name.
        As `resolve`.
    """
    registry, turnstile = Registry.of_user(), Turnstile()
    budget_bytes = serve_options.model_memory_bytes

    adapters = _AdapterOption(options.adapters or {}, num_models=len(texts))

    def make_entry(name: str, text: str) -> ModelEntry:
        own = adapters.of(name)
        opener = ModelOpener(
            name=name,
            text=text,
            options=options,
            turnstile=turnstile,
            budget_bytes=budget_bytes,
            adapters=own,
            is_alone=len(texts) == 1,
        )
        return ModelEntry(name, opener=opener, adapters=own)

    resolve_draft(options, offline=offline)  # downloaded, if it must be
    entries: list[ModelEntry] = []
    bases: list[str] = []
    single_versions: list[str] = []
    for text in texts:
        if is_model(Path(text).expanduser()):
            path = Path(text).expanduser().resolve()
            entries.append(make_entry(path.name, str(path)))
            continue
        name = _end_of_alias(text, registry)
        versions = _versions_of(name, registry)
        if not versions:
            resolve(name, offline=offline, progress=progress)
            entries.append(make_entry(name, name))
            if split_version(name)[1] is not None:
                single_versions.append(name)
            continue
        if budget_bytes is None:
            registry.model_of(name)  # which must be promoted: it is loaded now
        base = name.lower()
        bases.append(base)
        for version in versions:
            resolve(f"{base}@{version}", offline=offline, progress=progress)
            entries.append(make_entry(f"{base}@{version}", f"{base}@{version}"))
    adapters.check_all_used()
    memory = ModelMemory(
        entries,
        budget_bytes=budget_bytes,
        turn_seconds=serve_options.model_turn_seconds,
        drain_seconds=serve_options.model_drain_seconds,
        max_waiting=options.max_waiting,
    )
    table = ModelTable(
        memory,
        registry=registry,
        bases=bases,
        versions=single_versions,
        make_version=lambda name: make_entry(name, name),
    )
    for name in serve_options.pinned:
        try:
            table.find(name).is_pinned = True
        except ModelNotFoundError as error:
            raise OptionError(
                f"pinned names {name!r}: {error.message}", hint=error.hint, option="pinned"
            ) from error
    return table


class _AdapterOption:
    """What the option says of adapters, model by model."""

    def __init__(self, folders: Mapping[str, str | Path], *, num_models: int) -> None:
        self._folders = folders
        self._is_one = num_models == 1
        self._used: set[str] = set()

    def of(self, model: str) -> dict[str, Path]:
        """Those of a model, by name."""
        found: dict[str, Path] = {}
        for text, folder in self._folders.items():
            named, _, name = text.rpartition(":")
            if named in (model, split_version(model)[0]) or (not named and self._is_one):
                check_name(name)
                found[name] = Path(folder).expanduser().absolute()
                self._used.add(text)
        return found

    def check_all_used(self) -> None:
        """
        Raises:
            OptionError: an adapter is of no model that is served.
        """
        unused = next((text for text in self._folders if text not in self._used), None)
        if unused is not None:
            raise OptionError(
                f"the adapter {unused!r} is of no model that is served",
                hint="write MODEL:NAME=DIR, with the model's name"
                if not self._is_one
                else "write NAME=DIR, or the model's name before the colon",
                option="adapter",
            )


def _end_of_alias(text: str, registry: Registry) -> str:
    """What an alias stands for, promoted versions not followed; another text itself."""
    names = registry.names()
    names.follow(text)  # raises where it leads nowhere
    while text.lower() in names.aliases:
        text = names.aliases[text.lower()]
    return text


def _versions_of(name: str, registry: Registry) -> list[str]:
    """Of a name without one; none of a model's own name."""
    _, version = split_version(name)
    if version is not None or registry.find(name) is not None:
        return []
    return registry.versions_of(name.lower(), registry.names())
