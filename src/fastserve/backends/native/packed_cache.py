"""Packed weights kept on disk: packed at the first start, mapped at the next.

An entry is one file, named by a digest of what it was made from and how:

    magic, 8 bytes | length of the header, 8 bytes LE | SHA-256 of the header | header, JSON | arrays

The header holds the size of the whole file and, by name, where each array lies and how it is stored; arrays
begin at multiples of a page. Dense panels are the same for every instruction set; where some are sparse, the
header names the one that they were chosen for, and another packs again. A file is written beside its place
and renamed into it: one with the right header and size is whole. Masks of sparse arrays are compared with
where panels begin when they are mapped, so that none that was damaged since can be read beyond its end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import fastserve._native as _native
from fastserve.backends.native.weight_scheme import Storage, WeightScheme
from fastserve.checkpoint.file import map_file
from fastserve.errors import CheckpointError
from fastserve.graph.node import Parameter
from fastserve.hub.location import is_switched_on, store_home
from fastserve.types import JsonObject

logger = logging.getLogger(__name__)

MIN_BYTES = 16 * 2**20  # less is packed again faster than it is worth a file
MAX_BYTES = 64 * 2**30  # of all entries: the longest unused go first
_SPARED_BYTES = 2**30  # of the disk, left free for others

_MAGIC = b"FSPACK02"
_PREFIX_BYTES = len(_MAGIC) + 8 + 32
_PAGE_BYTES = 4096
_ENDING = ".packed"
_ABANDONED_SECONDS = 24 * 3600
_SAMPLED_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class PackedArray:
    """The panels of one matrix, and how they are stored."""

    panels: NDArray[np.uint8]
    storage: Storage


Arrays = Mapping[str, PackedArray]


@dataclass(frozen=True, slots=True)
class PackedCache:
    """The packed weights of one model. Nothing that goes wrong on the disk fails a run: it is logged."""

    files: tuple[Path, ...]  # that the tensors are in

    @classmethod
    def of(cls, files: Iterable[Path]) -> PackedCache | None:
        """None where FASTSERVE_PACKED_CACHE switches caching off.

        Raises:
            OptionError: its value is neither a yes nor a no.
        """
        return cls(tuple(files)) if is_switched_on("FASTSERVE_PACKED_CACHE", default=True) else None

    def load(self, schemes: Mapping[Parameter, WeightScheme], isa: str) -> Arrays:
        """The arrays that `save` got for these schemes and this instruction set, mapped; none where there are
        none."""
        try:
            identity = self._identity(schemes)
            path = _entry_path(identity)
            if not path.exists():
                return {}
            buffer = map_file(path)
            header = _read_header(buffer)
            if header is None or header["identity"] != identity:
                logger.info("%s is no whole entry: weights are packed again", path)
                return {}
            if header["isa"] not in (None, isa):
                logger.info("%s is for %s: weights are packed again for %s", path, header["isa"], isa)
                return {}
            os.utime(path)  # what was used last goes last
        except (OSError, CheckpointError) as error:
            logger.info("packed weights cannot be read: %s", error)
            return {}
        return {
            name: PackedArray(buffer[begin : begin + size], storage)
            for name, (begin, size, storage) in header["arrays"].items()
        }

    def save(self, schemes: Mapping[Parameter, WeightScheme], arrays: Arrays, isa: str) -> None:
        """Keep these arrays for the next start, and remove what is stale or too much."""
        num_bytes = sum(array.panels.nbytes for array in arrays.values())
        if num_bytes < MIN_BYTES:
            return
        try:
            identity = self._identity(schemes)
            path = _entry_path(identity)
            path.parent.mkdir(parents=True, exist_ok=True)
            prune(MAX_BYTES - num_bytes)
            free_bytes = shutil.disk_usage(path.parent).free
            if free_bytes < num_bytes + _SPARED_BYTES:
                logger.info("packed weights are not kept: %d bytes are free on %s", free_bytes, path.parent)
                return
            is_dense = all(array.storage == "dense" for array in arrays.values())
            _write(path, identity, arrays, None if is_dense else isa)
        except OSError as error:
            logger.info("packed weights are not kept: %s", error)

    def _identity(self, schemes: Mapping[Parameter, WeightScheme]) -> JsonObject:
        weights = {array_name(parameter): asdict(scheme) for parameter, scheme in schemes.items()}
        return {
            "layout": _native.PACKED_LAYOUT,
            "files": [_identify(path) for path in self.files],
            "weights": dict(sorted(weights.items())),
        }


def array_name(parameter: Parameter) -> str:
    """The name of a parameter's array: its tensors, in the order in which they are stacked."""
    return "+".join(parameter.names)


def packed_folder() -> Path:
    """Where the entries are."""
    return store_home() / "packed"


def packed_bytes() -> int:
    """The size of all entries."""
    return sum(path.stat().st_size for path in packed_folder().glob("*" + _ENDING))


def prune(max_bytes: int = MAX_BYTES) -> int:
    """Remove entries whose model has changed or is gone, then the longest unused until `max_bytes` are left;
    returns the bytes removed.

    Raises:
        OSError: the folder cannot be read or an entry not removed.
    """
    freed_bytes = kept_bytes = 0
    for path in sorted(packed_folder().glob("*"), key=lambda path: path.stat().st_mtime, reverse=True):
        status = path.stat()
        if path.suffix == _ENDING:
            is_kept = kept_bytes + status.st_size <= max_bytes and _is_current(path)
        else:
            is_kept = time.time() - status.st_mtime < _ABANDONED_SECONDS  # being written
        if is_kept:
            kept_bytes += status.st_size
        else:
            path.unlink(missing_ok=True)
            freed_bytes += status.st_size
    return freed_bytes


def _identify(path: Path) -> JsonObject:
    """A file, without reading all of it: a model of gigabytes must not be read twice to start."""
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLED_BYTES))
        file.seek(max(0, status.st_size - _SAMPLED_BYTES))
        digest.update(file.read(_SAMPLED_BYTES))
    return {
        "path": str(path.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ends_sha256": digest.hexdigest(),
    }


def _entry_path(identity: JsonObject) -> Path:
    return packed_folder() / (hashlib.sha256(_to_json(identity)).hexdigest()[:32] + _ENDING)


def _to_json(value: JsonObject) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _is_current(path: Path) -> bool:
    try:
        header = _read_header(map_file(path))
        return header is not None and all(
            _identify(Path(file["path"])) == file for file in header["identity"]["files"]
        )
    except (OSError, CheckpointError):
        return False


def _read_header(buffer: NDArray[np.uint8]) -> JsonObject | None:
    """The header, or None where the file is not one that `_write` finished."""
    prefix = buffer[:_PREFIX_BYTES].tobytes()
    length = int.from_bytes(prefix[8:16], "little")
    if len(prefix) < _PREFIX_BYTES or not prefix.startswith(_MAGIC) or length > buffer.nbytes:
        return None
    text = buffer[_PREFIX_BYTES : _PREFIX_BYTES + length].tobytes()
    if hashlib.sha256(text).digest() != prefix[16:]:
        return None
    header: JsonObject = json.loads(text)
    return header if header["file_bytes"] == buffer.nbytes else None


def _write(path: Path, identity: JsonObject, arrays: Arrays, isa: str | None) -> None:
    # The header says where arrays lie, which depends on its length: offsets are first counted from its end.
    def make_header(start: int) -> bytes:
        places, end = {}, start
        for name, array in arrays.items():
            places[name] = [end, array.panels.nbytes, array.storage]
            end = _round_up(end + array.panels.nbytes, _PAGE_BYTES)
        return _to_json({"identity": identity, "isa": isa, "file_bytes": end, "arrays": places})

    start = _round_up(_PREFIX_BYTES + len(make_header(0)) + 20 * len(arrays) + 40, _PAGE_BYTES)
    header = make_header(start)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header)
            file.seek(start)
            for array in arrays.values():
                file.write(array.panels.data)
                file.seek(_round_up(file.tell(), _PAGE_BYTES))
            file.truncate(file.tell())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
