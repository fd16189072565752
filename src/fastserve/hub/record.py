"""What the store knows of a model: its source, its licence, and its files with sizes and checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RECORD_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a model. `path` is relative to the model's folder and parted by slashes."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A registered model.

    `folder` holds its files: the store's own copy, or, for a registered folder, that folder. `archives` are
    the wheels that it came in, whose checksums a later download of the same source must match.
    """

    name: str
    source: str
    licence: str | None
    revision: str | None  # the commit, where the source has one
    registered_at: str  # ISO 8601, UTC
    folder: Path
    files: tuple[FileRecord, ...]
    archives: tuple[FileRecord, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def path(self) -> Path:
        """What a checkpoint reader opens: the .gguf file where the model is one, else the folder."""
        gguf = [file.path for file in self.files if file.path.endswith(".gguf")]
        return self.folder / gguf[0] if len(gguf) == 1 else self.folder

    @property
    def digest(self) -> str:
        """One checksum of all files, by their names: equal for equal files."""
        lines = (f"{file.sha256} {file.path}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def verify(self) -> dict[str, str]:
        """Read all files; what is wrong with those that are not as recorded, by path."""
        problems = {}
        for file in self.files:
            path = self.folder / file.path
            size = _size_of(path)
            if size is None:
                problems[file.path] = "is missing"
            elif size != file.size_bytes:
                problems[file.path] = f"has {size} bytes, not {file.size_bytes}"
            elif sha256_of(path) != file.sha256:
                problems[file.path] = f"does not match its sha256 {file.sha256}"
        return problems

    def damaged_files(self) -> list[str]:
        """Files that are missing or not of their recorded size. Contents are not read."""
        return [f.path for f in self.files if _size_of(self.folder / f.path) != f.size_bytes]

    def to_json(self) -> dict[str, Any]:
        """The record as `--json` prints it and as the store keeps it."""
        return {
            "version": RECORD_VERSION,
            "name": self.name,
            "source": self.source,
            "licence": self.licence,
            "revision": self.revision,
            "registered_at": self.registered_at,
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "files": [asdict(file) for file in self.files],
            "archives": [asdict(file) for file in self.archives],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], folder: Path) -> ModelRecord:
        """Read what `to_json` wrote; `folder` is where the files are now, so that a store can be moved.

        Raises:
            KeyError, TypeError, ValueError: the document is not a record of this version.
        """
        if document["version"] != RECORD_VERSION:
            raise ValueError(f"record version {document['version']}, not {RECORD_VERSION}")
        return cls(
            name=document["name"],
            source=document["source"],
            licence=document["licence"],
            revision=document["revision"],
            registered_at=document["registered_at"],
            folder=folder,
            files=tuple(FileRecord(**file) for file in document["files"]),
            archives=tuple(FileRecord(**file) for file in document["archives"]),
        )


def record_files(folder: Path, paths: Iterable[str]) -> tuple[FileRecord, ...]:
    """Sizes and checksums of files of a folder, in order of their names."""
    return tuple(
        FileRecord(path, (folder / path).stat().st_size, sha256_of(folder / path)) for path in sorted(paths)
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
