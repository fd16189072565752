"""A folder or .gguf file of the user's: registered where it is, never copied, changed or deleted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastserve.errors import ModelNotFoundError
from fastserve.hub.payload import choose_payload
from fastserve.hub.progress import Progress
from fastserve.hub.source import Fetched


def is_model(path: Path) -> bool:
    """Whether a path is a .gguf file, or a folder that holds a model at its top."""
    # os.path, unlike Path, answers no for a text that is too long, or otherwise no path at all.
    if os.path.isfile(path):
        return path.suffix == ".gguf"
    return os.path.isdir(path) and (any(path.glob("*.gguf")) or (path / "config.json").is_file())


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A model at an absolute path."""

    path: Path

    @property
    def spec(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.stem if self.path.suffix == ".gguf" else self.path.name

    @property
    def is_local(self) -> bool:
        return True

    def fetch(self, staging: Path, progress: Progress | None) -> Fetched:
        """See `Source.fetch`."""
        if self.path.is_file():
            return Fetched(folder=self.path.parent, files=(self.path.name,))
        names = (file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())
        payload = choose_payload(name for name in names if name.count("/") <= 1)
        if not payload or any(path != name for path, name in payload.items()):
            raise ModelNotFoundError(
                f"{self.path} holds no model: no .gguf file, and no .safetensors file beside a config.json",
                hint="name the folder that holds the model's files",
            )
        return Fetched(folder=self.path, files=tuple(payload))
