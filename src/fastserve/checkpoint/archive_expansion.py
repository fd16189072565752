"""Expands archives (`archive.py`) into the store, once each: the files that an archive was made of, held to
their digests.

    <store>/expanded/<key>/source.json   the archive's folder and files, by which it is found to be stale
    <store>/expanded/<key>/model/        the files

The key is a digest of the archive's path and of its files' sizes, times and ends. A folder appears whole; a
lock keeps processes from expanding one archive at the same time. What is stale is removed when another is
expanded or a model removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fastserve.checkpoint.archive_coding import import_coder
from fastserve.checkpoint.archive_reader import HINT, read_archive
from fastserve.checkpoint.file import read_json
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.hub.disk import disk_failures_reported, flush_to_disk, require_free_bytes
from fastserve.hub.location import store_home
from fastserve.types import JsonObject

logger = logging.getLogger(__name__)

ARCHIVE_FILE = "fastserve-archive.safetensors"
ARCHIVE_METHOD = "fastserve-archive"
ARCHIVE_VERSION = 1

_SPARED_BYTES = 2**28  # of the disk, left free for others
_SAMPLED_BYTES = 2**16
_ABANDONED_SECONDS = 24 * 3600


def is_archive(folder: Path) -> bool:
    return (folder / ARCHIVE_FILE).is_file()


def expand_archive(folder: Path) -> Path:
    """The folder of the model that an archive stands for, which is expanded where it is not there yet.

    Raises:
        CheckpointError: the archive is damaged: what it holds does not match its digests.
        UnsupportedError: constriction is not installed, or the archive is of another version.
        DownloadError: the store's disk is too full, or cannot be written.
    """
    from filelock import FileLock

    _check_version(folder)
    source = _identify(folder)
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:32]
    entry = expanded_folder() / key
    if _is_whole(entry):
        return entry / "model"
    with disk_failures_reported(expanded_folder()):
        expanded_folder().mkdir(parents=True, exist_ok=True)
        (store_home() / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(store_home() / "locks" / f"expanded-{key}.lock"):
            if not _is_whole(entry):  # another process may have expanded it meanwhile
                prune_expanded()
                _expand_into(folder, entry, source)
    return entry / "model"


def expanded_folder() -> Path:
    """Where expanded archives are."""
    return store_home() / "expanded"


def prune_expanded() -> int:
    """Remove what was expanded of archives that have changed or are gone; returns the bytes removed.

    Raises:
        OSError: a folder cannot be read or removed.
    """
    freed_bytes = 0
    for entry in sorted(expanded_folder().glob("*")):
        is_being_written = entry.name.startswith(".") and (
            time.time() - entry.stat().st_mtime < _ABANDONED_SECONDS
        )
        if not is_being_written and not _is_current(entry):
            freed_bytes += sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
            shutil.rmtree(entry)
    return freed_bytes


def _check_version(folder: Path) -> None:
    quantization = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != ARCHIVE_METHOD:
        raise CheckpointError(
            f"{folder} has {ARCHIVE_FILE}, but its config.json is not that of an archive", hint=HINT
        )
    if quantization.get("version") != ARCHIVE_VERSION:
        raise UnsupportedError(
            f"{folder} is an archive of version {quantization.get('version')!r:.80}, supported is"
            f" {ARCHIVE_VERSION}",
            hint="a newer FastServe may open it",
        )


def _identify(folder: Path) -> JsonObject:
    """What tells whether an archive is still the one that was expanded, without reading all of it."""
    files = {}
    for path in _files_of(folder):
        status = path.stat()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, status.st_size - _SAMPLED_BYTES))
            digest.update(file.read(_SAMPLED_BYTES))
        files[path.relative_to(folder).as_posix()] = [status.st_size, status.st_mtime_ns, digest.hexdigest()]
    return {"folder": str(folder.resolve()), "files": files}


def _files_of(folder: Path) -> Iterator[Path]:
    """Of an archive: those of sentence-transformers are in folders of their own."""
    for path in sorted([*folder.iterdir(), *folder.glob("*_*/*.json")]):
        if path.is_file() and not path.name.startswith("."):
            yield path


def _is_whole(entry: Path) -> bool:
    """Whether an expanded model has all files, in their sizes."""
    try:
        sizes = json.loads((entry / "source.json").read_text(encoding="utf-8"))["sizes"]
        return all((entry / "model" / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _is_current(entry: Path) -> bool:
    try:
        source = json.loads((entry / "source.json").read_text(encoding="utf-8"))
        return bool(_identify(Path(source["folder"])) == {key: source[key] for key in ("folder", "files")})
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _expand_into(folder: Path, entry: Path, source: JsonObject) -> None:
    import_coder()
    archive = read_archive(folder / ARCHIVE_FILE)
    require_free_bytes(entry.parent, archive.num_bytes + _SPARED_BYTES)
    logger.info("expanding %s into the store, once", folder)
    start = time.perf_counter()
    staging = Path(tempfile.mkdtemp(prefix=".", dir=entry.parent))
    try:
        model = staging / "model"
        model.mkdir()
        for path in _files_of(folder):
            if path.name not in (ARCHIVE_FILE, "config.json"):
                target = model / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        archive.write(model)
        files = [path for path in model.rglob("*") if path.is_file()]
        sizes = {path.relative_to(model).as_posix(): path.stat().st_size for path in files}
        (staging / "source.json").write_text(json.dumps({**source, "sizes": sizes}), encoding="utf-8")
        flush_to_disk([*files, model, staging / "source.json", staging])
        if entry.exists():  # damaged
            shutil.rmtree(entry)
        staging.rename(entry)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    seconds = time.perf_counter() - start
    speed = archive.num_bytes / seconds / 1e6
    logger.info("%d bytes expanded in %.1f s, %.0f MB/s", archive.num_bytes, seconds, speed)
