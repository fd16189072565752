"""Slower memory for KV blocks, in host memory or in a file.

Invariant: what a block reads is what was last written to it, bit by bit, or an error; a full disk is found
when the file is made, not while sequences run.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np

from fastserve.engine.available_memory import available_memory_bytes
from fastserve.errors import MemoryLimitError, OptionError
from fastserve.types import UInt8Array

_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
# Where systems that keep /tmp in memory want large temporary files (Filesystem Hierarchy Standard 3.0, 5.15).
_LARGE_TEMPORARY_FOLDER = Path("/var/tmp")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

logger = logging.getLogger(__name__)


class SlowTier(Protocol):
    """Slow blocks 0 to num_blocks - 1, each of which holds what a KV block does. One thread at a time uses
    it."""

    @property
    def num_blocks(self) -> int: ...

    def write(self, block: int, data: UInt8Array) -> None:
        """Keep a copy of `data`, uint8 [block_bytes], contiguous.

        Raises:
            OSError: it could not be kept; the block then holds nothing that is worth reading.
        """
        ...

    def read(self, block: int, out: UInt8Array) -> None:
        """Copy what was last written to the block into `out`, uint8 [block_bytes], contiguous.

        Raises:
            OSError: it could not be read; `out` then holds anything.
        """
        ...

    def close(self) -> None:
        """Give the memory back. Closing again does nothing."""
        ...


class HostTier:
    """Blocks in this machine's memory, all of it taken at once: for KV pools that lie on a device.

    >>> tier = HostTier(num_blocks=2, block_bytes=3)
    >>> tier.write(1, np.array([1, 2, 3], np.uint8))
    >>> out = np.empty(3, np.uint8)
    >>> tier.read(1, out)
    >>> out
    array([1, 2, 3], dtype=uint8)

    Raises:
        MemoryLimitError: there is not so much memory.
    """

    def __init__(self, *, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        num_bytes = num_blocks * block_bytes
        available_bytes = available_memory_bytes()
        if available_bytes is not None and num_bytes > available_bytes:
            raise _memory_too_small(num_bytes, f"{_mib(available_bytes)} are available")
        try:
            self._blocks = np.empty((num_blocks, block_bytes), np.uint8)
        except MemoryError as error:
            raise _memory_too_small(num_bytes, "the system does not grant it") from error
        self._blocks.fill(0)  # pages are had now, not in the midst of a move

    def write(self, block: int, data: UInt8Array) -> None:
        np.copyto(self._blocks[_checked(block, self)], data)

    def read(self, block: int, out: UInt8Array) -> None:
        np.copyto(out, self._blocks[_checked(block, self)])

    def close(self) -> None:
        self._blocks = np.empty((0, 0), np.uint8)


class SpillFile:
    """Blocks in a temporary file that has no name, is its owner's alone, and has its whole size on disk from
    the beginning.

    It is read and written at positions, never mapped: an error of the disk is an OSError of one transfer,
    where it would kill a process that had mapped the file. It is gone with the process, however that ends.

    Args:
        folder: where the disk is taken from; None is `default_spill_folder()`.

    Raises:
        OptionError: the folder is none, or cannot be written to.
        MemoryLimitError: its disk has not so much space. Only file systems that copy on writing (Btrfs, ZFS)
            may still run full later; that is an OSError of `write`.
    """

    def __init__(
        self, *, num_blocks: int, block_bytes: int, folder: str | os.PathLike[str] | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self._block_bytes = block_bytes
        path = default_spill_folder() if folder is None else Path(folder)
        if folder is not None and file_system_of(path) in _MEMORY_FILE_SYSTEMS:
            logger.warning(
                "spill_dir=%s lies in memory: what spills there is taken from the same memory", path
            )
        _require_space(path, num_blocks * block_bytes)
        try:
            # Never has a name where the system can do that (O_TMPFILE), else is unlinked at once; mode 0600.
            self._file = tempfile.TemporaryFile(dir=path, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OptionError(
                f"no spill file can be made in {path}: {error.strerror}",
                hint="name a folder that you may write to with spill_dir",
            ) from error
        try:
            _allocate(self._file, path, num_blocks * block_bytes)
        except BaseException:
            self._file.close()
            raise

    def write(self, block: int, data: UInt8Array) -> None:
        rest, offset = data.data, self._offset(block)
        while rest:
            num_bytes = _write_at(self._file, rest, offset)
            if num_bytes == 0:
                raise OSError(errno.EIO, "the spill file takes no more bytes")
            rest, offset = rest[num_bytes:], offset + num_bytes

    def read(self, block: int, out: UInt8Array) -> None:
        rest, offset = out.data, self._offset(block)
        while rest:
            num_bytes = _read_at(self._file, rest, offset)
            if num_bytes == 0:
                raise OSError(errno.EIO, "the spill file is shorter than it was made")
            rest, offset = rest[num_bytes:], offset + num_bytes

    def close(self) -> None:
        self._file.close()

    def _offset(self, block: int) -> int:
        return _checked(block, self) * self._block_bytes


def default_spill_folder() -> Path:
    """The system's folder of temporary files (TMPDIR), or /var/tmp where that one lies in memory, which
    spilling is to spare.

    Raises:
        OptionError: neither is on a disk.
    """
    candidates = [Path(tempfile.gettempdir()), _LARGE_TEMPORARY_FOLDER]
    for folder in candidates:
        if folder.is_dir() and file_system_of(folder) not in _MEMORY_FILE_SYSTEMS:
            return folder
    raise OptionError(
        f"kv_spill has no disk: {' and '.join(map(str, candidates))} lie in memory or do not exist",
        hint="name a folder on a disk with spill_dir, or leave kv_spill out",
    )


def file_system_of(folder: Path, *, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The kind of file system that a folder lies on (`ext4`, `tmpfs`), by its device; None where nobody says.

    proc_pid_mountinfo(5): the third field is the device, the one after the dash is the kind.
    """
    try:
        device = os.stat(folder).st_dev
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    name = f"{os.major(device)}:{os.minor(device)}"
    fields = (line.split() for line in lines)
    return next((row[row.index("-") + 1] for row in fields if row[2] == name), None)


def _require_space(folder: Path, num_bytes: int) -> None:
    """Say it before a disk is filled to its last byte, which others need."""
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise OptionError(
            f"spill_dir={str(folder)!r} cannot be used: {error.strerror}", hint="name a folder that exists"
        ) from error
    if free_bytes < num_bytes:
        raise _disk_too_full(folder, num_bytes, free_bytes)


def _allocate(file: FileIO, folder: Path, num_bytes: int) -> None:
    """Take the whole size from the disk."""
    if num_bytes == 0:
        return
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:
            _write_zeros(file, num_bytes)
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_too_full(folder, num_bytes, shutil.disk_usage(folder).free) from error
        raise OptionError(
            f"no spill file of {_mib(num_bytes)} can be made in {folder}: {error.strerror}",
            hint="name a folder on another disk with spill_dir",
        ) from error


# macOS has no posix_fallocate, Windows none of the three calls. Tests run what stands in for them on Linux;
# nobody has run it there.


def _write_zeros(file: FileIO, num_bytes: int) -> None:
    zeros = bytes(min(num_bytes, 2**20))
    while num_bytes > 0:
        num_bytes -= file.write(zeros[:num_bytes]) or 0


def _write_at(file: FileIO, data: memoryview, offset: int) -> int:
    """How many bytes went there; the call may write less than it is given."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), data, offset)
    file.seek(offset)
    return file.write(data) or 0


def _read_at(file: FileIO, out: memoryview, offset: int) -> int:
    """How many bytes came; the call may read less than it is asked for."""
    if hasattr(os, "preadv"):  # pread into memory that is there already
        return os.preadv(file.fileno(), [out], offset)
    file.seek(offset)
    return file.readinto(out) or 0


def _checked(block: int, tier: SlowTier) -> int:
    assert 0 <= block < tier.num_blocks, f"block {block} of {tier.num_blocks}"
    return block


def _disk_too_full(folder: Path, num_bytes: int, free_bytes: int) -> MemoryLimitError:
    return MemoryLimitError(
        f"kv_spill needs {_mib(num_bytes)} on the disk of {folder}, which has {_mib(free_bytes)} free",
        hint="choose a smaller kv_spill, free some space, or name a folder on a larger disk with spill_dir",
    )


def _memory_too_small(num_bytes: int, reason: str) -> MemoryLimitError:
    return MemoryLimitError(
        f"kv_spill needs {_mib(num_bytes)} of memory; {reason}", hint="choose a smaller kv_spill"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
