"""Names that stand for models of the store: aliases, and versions of which one is promoted.

    names.json    {"version": 1, "aliases": {ALIAS: NAME},
                   "versions": {NAME: {VERSION: {"model": MODEL, "digest": DIGEST}}},
                   "promoted": {NAME: VERSION}}

It is replaced by a rename, so that a reader finds it whole. Names in it are in lower case.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastserve.errors import OptionError
from fastserve.hub.disk import flush_to_disk

TABLE_VERSION = 1

_WORD = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """What a version is: a registered model, and the digest that its files had when the version was made."""

    model: str
    digest: str


@dataclass(frozen=True, slots=True)
class NameTable:
    """The names of one store. It is a value: what changes it gives another.

    >>> table = NameTable(aliases={"chat": "smollm2-135m-instruct"})
    >>> table.follow("Chat"), table.follow("all-minilm-l6-v2")
    ('smollm2-135m-instruct', 'all-minilm-l6-v2')
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, Mapping[str, PinnedModel]] = field(default_factory=dict)
    promoted: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def path(home: Path) -> Path:
        return home / "names.json"

    @classmethod
    def read(cls, home: Path) -> NameTable:
        """The table of the store at `home`; an empty one where it has none.

        Raises:
            OptionError: the file is none of ours.
        """
        path = cls.path(home)
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return cls()
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise OptionError(
                f"{path} is no table of names ({error})",
                hint="repair it, or delete it and all aliases with it",
            ) from error

    def write(self, home: Path) -> None:
        """Replace the table of the store at `home`. The caller holds its lock."""
        path = self.path(home)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.to_json(), indent=2), encoding="utf-8")
        flush_to_disk([new])
        os.replace(new, path)
        flush_to_disk([home])

    def follow(self, name: str) -> str:
        """What a name stands for, by aliases and promoted versions: `NAME@VERSION`, or the name of a model;
        itself where it is neither alias nor has a promoted version.

        Raises:
            OptionError: it is an alias of itself, which only a table that was edited by hand can have.
        """
        passed: list[str] = []
        while (key := name.lower()) in self.aliases:
            if key in passed:
                raise OptionError(
                    f"the alias {key} stands for itself", hint=f"run `fastserve models alias {key} NAME`"
                )
            passed.append(key)
            name = self.aliases[key]
        return f"{key}@{self.promoted[key]}" if key in self.promoted else name

    def pinned(self, name: str) -> PinnedModel | None:
        """What `NAME@VERSION` is, where the table says so."""
        base, version = split_version(name)
        return None if version is None else self.versions.get(base, {}).get(version)

    def users_of(self, name: str) -> list[str]:
        """The aliases and versions that stand for a name directly."""
        key = name.lower()
        base, version = split_version(key)
        users = [alias for alias, target in self.aliases.items() if target.lower() == key]
        users += [
            f"{base_}@{version_}"
            for base_, versions in self.versions.items()
            for version_, pinned in versions.items()
            if pinned.model.lower() == key
        ]
        if version is not None and self.promoted.get(base) == version:
            users += [alias for alias, target in self.aliases.items() if target.lower() == base]
        return users

    def with_alias(self, alias: str, target: str) -> NameTable:
        """
        Raises:
            OptionError: it would stand for itself.
        """
        name = target.lower()
        while name in self.aliases and name != alias:
            name = self.aliases[name].lower()
        if name == alias:
            raise OptionError(
                f"{alias} would stand for itself: {target} stands for it",
                hint="choose the name of a model or version",
            )
        return replace(self, aliases={**self.aliases, alias: target})

    def with_version(self, base: str, version: str, pinned: PinnedModel) -> NameTable:
        versions = {**self.versions.get(base, {}), version: pinned}
        return replace(self, versions={**self.versions, base: versions})

    def with_promoted(self, base: str, version: str) -> NameTable:
        return replace(self, promoted={**self.promoted, base: version})

    def without(self, name: str) -> NameTable:
        """Without an alias or a version, and without its promotion."""
        key = name.lower()
        if key in self.aliases:
            return replace(self, aliases={a: t for a, t in self.aliases.items() if a != key})
        base, version = split_version(key)
        rest = {v: pinned for v, pinned in self.versions.get(base, {}).items() if v != version}
        versions = {b: vs for b, vs in {**self.versions, base: rest}.items() if vs}
        promoted = {b: v for b, v in self.promoted.items() if (b, v) != (base, version)}
        return replace(self, versions=versions, promoted=promoted)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": TABLE_VERSION,
            "aliases": dict(self.aliases),
            "versions": {b: {v: asdict(p) for v, p in vs.items()} for b, vs in self.versions.items()},
            "promoted": dict(self.promoted),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> NameTable:
        """Read what `to_json` wrote.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: the document is no table of this version.
        """
        if document["version"] != TABLE_VERSION:
            raise ValueError(f"its version is {document['version']}, not {TABLE_VERSION}")
        return cls(
            aliases={str(alias): str(target) for alias, target in document["aliases"].items()},
            versions={
                str(base): {str(version): PinnedModel(**pinned) for version, pinned in versions.items()}
                for base, versions in document["versions"].items()
            },
            promoted={str(base): str(version) for base, version in document["promoted"].items()},
        )


def split_version(name: str) -> tuple[str, str | None]:
    """A name in lower case, and its version; None where it has none.

    >>> split_version("Chat@2"), split_version("chat")
    (('chat', '2'), ('chat', None))
    """
    base, at, version = name.lower().rpartition("@")
    return (base, version) if at and base and version else (name.lower(), None)


def check_word(what: str, text: str) -> None:
    """
    Raises:
        OptionError: it can be no name or version: letters, digits, dots, hyphens and underscores can.
    """
    if not _WORD.fullmatch(text):
        raise OptionError(
            f"the {what} {text!r} is no word",
            hint="choose letters, digits, dots, hyphens and underscores, such as chat or chat@2",
        )
