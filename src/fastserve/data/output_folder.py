"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastserve.errors import DataError


@contextmanager
def replacing_folder(target: Path, *, marker: str) -> Iterator[Path]:
    """A new folder beside `target` to write into, which takes its place at the end, unless something fails.

    What is at `target` goes, if it has the file `marker`: an earlier folder of the same kind.

    Raises:
        DataError: something else is at `target`.
    """
    target = target.resolve()
    if target.exists() and not (target / marker).is_file() and not _is_empty(target):
        raise DataError(
            f"{target} is there already, and no {marker} is in it", hint="name a folder that is not there yet"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
            target.rename(old / target.name)
            staging.rename(target)
            shutil.rmtree(old)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _umask() -> int:
    """The mask of the process; mkdtemp lets nobody else read what it makes."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
