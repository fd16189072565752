"""The models that have a short name, read from catalogue.json, which is shipped with the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from fastserve.hub.hf_source import PREFIX as HF_PREFIX
from fastserve.hub.hf_source import HfSource
from fastserve.hub.source import Source
from fastserve.hub.wheel_source import Wheel, WheelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model that is known by name, and the sources that have it, the one to try first first."""

    name: str
    title: str
    licence: str
    architecture: str
    size_bytes: int  # of the files from the first source; those of the hub are rounded
    sources: tuple[Source, ...]
    is_gated: bool = False  # the hub gives it to those who accepted its licence there

    @property
    def text(self) -> str:
        """What `search` looks through."""
        specs = " ".join(source.spec for source in self.sources)
        return f"{self.name} {self.title} {self.licence} {self.architecture} {specs}".lower()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "licence": self.licence,
            "architecture": self.architecture,
            "size_bytes": self.size_bytes,
            "is_gated": self.is_gated,
            "sources": [source.spec for source in self.sources],
        }


@cache
def load_catalogue() -> tuple[CatalogueEntry, ...]:
    """All entries, in the order of the file."""
    text = resources.files("fastserve.hub").joinpath("catalogue.json").read_text(encoding="utf-8")
    return tuple(_read_entry(entry) for entry in json.loads(text)["models"])


def find_entry(name: str) -> CatalogueEntry | None:
    """The entry of that name, in any case."""
    return next((entry for entry in load_catalogue() if entry.name == name.lower()), None)


def search(words: Iterable[str]) -> list[CatalogueEntry]:
    """The entries in whose name, title, licence, architecture or sources all the words are, in any case.

    >>> [entry.name for entry in search(["chinese", "bge"])]
    ['bge-small-zh-v1.5']
    """
    wanted = [word.lower() for word in words]
    return [entry for entry in load_catalogue() if all(word in entry.text for word in wanted)]


def find_source(spec: str) -> Source | None:
    """The source that a user spells out, as the catalogue has it: with pinned checksums."""
    sources = (source for entry in load_catalogue() for source in entry.sources)
    return next((source for source in sources if source.spec == spec), None)


def _read_entry(entry: Mapping[str, Any]) -> CatalogueEntry:
    return CatalogueEntry(**{**entry, "sources": tuple(_read_source(source) for source in entry["sources"])})


def _read_source(source: Mapping[str, Any]) -> Source:
    if "wheels" in source:
        return WheelSource(tuple(Wheel(**wheel) for wheel in source["wheels"]))
    return HfSource.parse(HF_PREFIX + source["hf"])
