"""Unpacks tar archives of strangers, under the same rules as zip archives (`archive`)."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastserve.errors import DownloadError
from fastserve.hub.archive import MAX_EXPANSION, MAX_MEMBERS, find_name_problem
from fastserve.hub.disk import require_free_bytes

_GZIP = b"\x1f\x8b"
_MAX_READ_BYTES = 1 << 20  # of one header or one piece of a member


def member_names(path: Path) -> list[str]:
    """The files in a tar archive, plain or compressed by gzip, all of which are safe to extract.

    Raises:
        DownloadError: it is none; a member is absolute, climbs with `..`, is a link or a device, or comes
            twice; or the members are too many, or too large for the archive's size.
    """
    with _opened(path) as members:
        return [member.name for member, _ in members if member.isreg()]


def extract(path: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write members (path under `folder` to name in the archive), checking the disk's free space.

    Raises:
        DownloadError: the disk is too small, or the archive is corrupt or not safe.
    """
    targets = {name: target for target, name in members.items()}
    with _opened(path) as opened:
        for member, content in opened:
            if member.name not in targets:
                continue
            require_free_bytes(folder, member.size)
            target = folder / targets[member.name]
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                shutil.copyfileobj(content, file, _MAX_READ_BYTES)
            if target.stat().st_size != member.size:
                raise DownloadError(f"{member.name} in the archive is corrupt", hint="download it again")


@contextmanager
def _opened(path: Path) -> Iterator[Iterator[tuple[tarfile.TarInfo, BinaryIO]]]:
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == _GZIP
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            bounded = _BoundedReads(stream)
            with tarfile.open(fileobj=bounded, mode="r:") as archive:  # type: ignore[call-overload]
                yield _safe_members(archive, path)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DownloadError(f"{path.name} is not a tar archive: {error}", hint="download it again") from error


def _safe_members(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    archive_bytes = path.stat().st_size
    seen: set[str] = set()
    total_bytes = 0
    for member in archive:
        problem = find_name_problem(member.name)
        total_bytes += member.size
        if not (member.isreg() or member.isdir()) or member.issparse():
            problem = "is a link or a device"
        elif member.name in seen:
            problem = "comes twice"
        elif len(seen) == MAX_MEMBERS:
            problem = f"is one of more than {MAX_MEMBERS}"
        elif total_bytes > MAX_EXPANSION * archive_bytes:
            problem = f"makes {total_bytes} bytes of {archive_bytes}, more than {MAX_EXPANSION} times"
        if problem:
            raise DownloadError(
                f"{path.name} is not safe to unpack: its member {member.name!r} {problem}",
                hint="do not trust its source",
            )
        seen.add(member.name)
        content = archive.extractfile(member) if member.isreg() else None
        if content is not None:
            yield member, content  # type: ignore[misc]


class _BoundedReads:
    """A file of which no more than a piece is read at once: headers say how long they are themselves."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
