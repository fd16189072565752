"""From what a user writes to the model's name and the sources to fetch it from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastserve.errors import ModelNotFoundError, OptionError
from fastserve.hub import hf_source, url_source, wheel_source
from fastserve.hub.catalogue import find_entry, find_source
from fastserve.hub.folder_source import FolderSource, is_model
from fastserve.hub.hf_source import HfSource
from fastserve.hub.registry import Registry, not_found
from fastserve.hub.source import Source
from fastserve.hub.url_source import parse_url
from fastserve.hub.wheel_source import WheelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A model's name and its sources, the one to try first first."""

    name: str
    sources: tuple[Source, ...]
    licence: str | None = None


def find_origin(name_or_source: str, registry: Registry) -> Origin:
    """Understand a name of the catalogue or the registry, an alias, a version, a source, or the path of a
    folder or .gguf file.

    Raises:
        ModelNotFoundError: it is none of these, or empty.
        OptionError: it is a source, but badly formed; or a folder whose name belongs to the catalogue, or
            stands for another model.
        CheckpointError: see `Registry.model_of`.
    """
    check_not_empty(name_or_source)
    name_or_source = registry.model_of(name_or_source)
    if entry := find_entry(name_or_source):
        return Origin(name=entry.name, sources=entry.sources, licence=entry.licence)
    if source := parse_source(name_or_source):
        names = registry.names()
        if names.follow(source.name) != source.name:
            raise OptionError(
                f"{name_or_source} would be registered as {source.name}, which stands for "
                f"{names.follow(source.name)}",
                hint=f"run `fastserve models remove {source.name}` first, or rename the folder",
            )
        return Origin(name=source.name, sources=(source,))
    record = registry.find(name_or_source)
    if record and (source := parse_source(record.source)):
        return Origin(name=record.name, sources=(source,), licence=record.licence)
    raise not_found(name_or_source, registry)


def check_not_empty(name_or_source: str) -> None:
    """Raise ModelNotFoundError for an empty name, which as a path would be the current folder."""
    if not name_or_source.strip():
        raise ModelNotFoundError(
            "the model's name is empty", hint="`fastserve models list` shows what there is"
        )


def parse_source(text: str) -> Source | None:
    """The source that a text spells, or None where it can only be a name.

    Raises:
        OptionError, ModelNotFoundError: see `find_origin`.
    """
    if known := find_source(text):
        return known
    if text.startswith(hf_source.PREFIX):
        return HfSource.parse(text)
    if text.startswith(wheel_source.PREFIX):
        return WheelSource.parse(text)
    if text.lower().startswith(url_source.PREFIXES):
        return parse_url(text)
    path = Path(os.path.abspath(Path(text).expanduser()))
    if not is_model(path):
        if looks_like_path(text):
            raise no_model_at(text)
        return None
    folder = FolderSource(path)
    if find_entry(folder.name):
        raise OptionError(
            f"the folder {text} has the name of a model of the catalogue",
            hint="give its path where a model is asked for, or rename it to register it",
        )
    return folder


def looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.endswith(".gguf") or os.path.exists(text)


def no_model_at(text: str) -> ModelNotFoundError:
    problem = "holds no model" if os.path.exists(Path(text).expanduser()) else "does not exist"
    return ModelNotFoundError(
        f"{text} {problem}",
        hint="name a .gguf file, or a folder with a config.json and .safetensors files",
    )
