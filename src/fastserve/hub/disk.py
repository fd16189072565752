"""Disk space and disk failures, as messages that a user can act on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastserve.errors import DownloadError

_FREE_SPACE_HINT = "free some space, or set FASTSERVE_HOME to a folder on a larger disk"


def require_free_bytes(folder: Path, needed_bytes: int) -> None:
    """Raise DownloadError, with both numbers, unless the disk of `folder` has `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DownloadError(
            f"the disk of {folder} is too full: "
            f"{_megabytes(needed_bytes)} needed, {_megabytes(free_bytes)} free",
            hint=_FREE_SPACE_HINT,
        )


def disk_full_error(folder: Path) -> DownloadError:
    free_bytes = shutil.disk_usage(folder).free
    return DownloadError(
        f"the disk of {folder} ran full during the download ({_megabytes(free_bytes)} free)",
        hint=_FREE_SPACE_HINT,
    )


@contextmanager
def disk_failures_reported(folder: Path) -> Iterator[None]:
    """Turn failures of the operating system to write below `folder` into DownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full_error(folder) from error
        # What the store writes into it has made before: only folders that cannot be made are missing.
        reason = "no folder can be made there" if error.errno == errno.ENOENT else error.strerror or error
        raise DownloadError(
            f"cannot write {error.filename or folder}: {reason}",
            hint="set FASTSERVE_HOME to a folder that you may write to",
        ) from error


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def flush_to_disk(paths: Iterable[Path]) -> None:
    """fsync files and folders, so that a rename that follows shows nothing that a power cut could lose."""
    for path in paths:
        if path.is_dir() and os.name == "nt":
            continue  # Windows has no handle to flush for a folder
        descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
