"""The seam between the store and the places that models come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastserve.errors import DownloadError
from fastserve.hub.progress import Progress
from fastserve.hub.record import FileRecord


class SourceUnavailableError(DownloadError):
    """A source could not be reached or does not have the model: the next source may be tried instead.

    A checksum mismatch, an unsafe archive and a full disk are not of this kind: they end the download.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a source brought: `files` (relative, parted by slashes) lie in `folder`."""

    folder: Path
    files: tuple[str, ...]
    licence: str | None = None
    revision: str | None = None
    archives: tuple[FileRecord, ...] = ()


class Source(Protocol):
    """One place that has one model."""

    @property
    def spec(self) -> str:
        """How a user writes it; kept in the record."""
        ...

    @property
    def name(self) -> str:
        """The name under which the model is registered when the catalogue has none for it."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether it can be fetched without a network."""
        ...

    def fetch(self, staging: Path, progress: Progress | None) -> Fetched:
        """Bring the model's files, verified.

        `staging` belongs to this model and this process alone. What an earlier, interrupted fetch left there
        may be used again after checking it. The folder returned lies in `staging`, which the store then moves
        away as a whole, or, for a local source, outside it, and is then never written to.

        Raises:
            SourceUnavailableError: the source does not answer or does not have the model.
            DownloadError: what came is not what was promised, or the disk is full.
        """
        ...
