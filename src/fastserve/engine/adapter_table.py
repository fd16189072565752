"""The adapters that are loaded beside a model, by name; they are swapped while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Self

from fastserve.checkpoint.adapter import ADAPTER_FILES, open_adapter
from fastserve.config import EngineOptions
from fastserve.engine.adapter import ServedAdapter
from fastserve.engine.load import LoadedModel, graph_of
from fastserve.errors import ModelNotFoundError, OptionError, UnsupportedError
from fastserve.models.adapter import fit_adapter


class AdapterTable:
    """The adapters of one model. Threads may load, find and forget some at once."""

    def __init__(self, model: LoadedModel, *, model_name: str) -> None:
        self._model = model
        self._model_name = model_name
        self._adapters: Mapping[str, ServedAdapter] = {}  # replaced as a whole: who reads needs no lock
        self._lock = Lock()  # of who replaces it

    @classmethod
    def of(cls, model: LoadedModel, options: EngineOptions, *, model_name: str) -> Self:
        """With the adapters that the options name. Raises as `load`."""
        table = cls(model, model_name=model_name)
        for name, path in (options.adapters or {}).items():
            table.load(name, path)
        return table

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def load(self, name: str, path: str | Path) -> ServedAdapter:
        """Read the adapter in a folder, as peft saves it. Whoever asks for the name from now on gets it, in
        place of one that had it before.

        Raises:
            OptionError: the name is none, the model was loaded without room for adapters, or a rank is above
                its `max_adapter_rank`.
            ModelNotFoundError, CheckpointError, UnsupportedError: the adapter cannot be read, is one of
                another model, or cannot be added beside it.
        """
        if self._model.ensemble is not None:
            raise UnsupportedError(
                f"the model {self._model_name!r} is an ensemble, which has no adapters",
                hint="merge the adapter into a member: `fastserve convert MEMBER --adapter DIR`",
            )
        limits = self._model.executable.limits
        if not limits.num_adapter_slots:
            raise OptionError(
                f"the model {self._model_name!r} was loaded without room for adapters",
                hint="load it with max_adapters, or with adapters to begin with",
            )
        check_name(name)
        folder = Path(path).expanduser()
        adapter = open_adapter(folder)
        matrices = fit_adapter(
            adapter,
            graph_of(self._model),
            self._model.config,
            self._model.checkpoint.tensors,
            max_rank=limits.max_adapter_rank,
        )
        served = ServedAdapter(name, folder, _digest(folder), matrices)
        with self._lock:
            self._adapters = {**self._adapters, name: served}
        return served

    def unload(self, name: str) -> None:
        """Forget an adapter. Requests that have it go on with it.

        Raises:
            ModelNotFoundError: there is none of that name.
        """
        with self._lock:
            self.find(name)
            self._adapters = {key: adapter for key, adapter in self._adapters.items() if key != name}

    def find(self, name: str) -> ServedAdapter:
        """
        Raises:
            ModelNotFoundError: there is none of that name; it says which there are.
        """
        adapter = self._adapters.get(name)
        if adapter is None:
            known = ", ".join(self._adapters)
            raise ModelNotFoundError(
                f"the model {self._model_name!r} has no adapter {name[:100]!r}",
                hint=f"it has {known}" if known else "none are loaded beside it",
            )
        return adapter

    def __iter__(self) -> Iterator[ServedAdapter]:
        return iter(self._adapters.values())


def check_name(name: str) -> None:
    """
    Raises:
        OptionError: an adapter cannot be called so: requests name it after a colon.
    """
    if not name or not name.isprintable() or any(c in name for c in ":=@/ "):
        raise OptionError(
            f"an adapter cannot be called {name[:100]!r}",
            hint="choose a name without spaces and : = @ /",
        )


def _digest(folder: Path) -> bytes:
    digest = blake2b(digest_size=16)
    for name in ADAPTER_FILES:
        digest.update((folder / name).read_bytes())
    return digest.digest()
