"""Where an artifact comes from: the parent's digest, the recipe, digests of data, seed, versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from fastserve._version import __version__
from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.types import JsonObject

_VERSIONS_OF = ("torch", "transformers", "tokenizers", "numpy", "constriction")


def make_lineage(
    spec: str, checkpoint: Checkpoint, recipe: JsonObject, data: Mapping[str, Path], seed: int
) -> JsonObject:
    """`data` are files by what they were for; those that are None were not given."""
    parent: dict[str, object] = {
        "model": spec,
        "weights_sha256": digest(checkpoint.files),
        "format": checkpoint.format,
    }
    if "lineage" in checkpoint.card:
        parent["lineage"] = checkpoint.card["lineage"]
    return {
        "parent": parent,
        "recipe": recipe,
        "data": {name: {"file": path.name, "sha256": digest([path])} for name, path in data.items()},
        "seed": seed,
        "versions": _versions(),
    }


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of files, one after the other."""
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                found.update(block)
    return found.hexdigest()


def _versions() -> dict[str, str]:
    found = {"fastserve": __version__, "python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
