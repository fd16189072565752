"""How much memory this process may still take: what the machine has free, and what its control groups and its
own limits leave.

Linux is what we run on; macOS and Windows are written to their documentation and not run by anyone yet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path


def available_memory_bytes(
    *, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The least of what the machine, every enclosing control group and the limits of the process have left;
    None where nobody says."""
    if sys.platform == "win32":
        return _windows_available_bytes()
    if not (proc / "meminfo").exists():
        return total_memory_bytes()  # an upper bound: nothing better is to be had without a tool
    return min(
        [
            _meminfo_available_bytes(proc),
            *_cgroup_available_bytes(proc, cgroup),
            *_process_available_bytes(proc),
        ]
    )


def _meminfo_available_bytes(proc: Path) -> int:
    return _read_table(proc / "meminfo")["MemAvailable:"] * 1024


def _cgroup_available_bytes(proc: Path, cgroup: Path) -> Iterator[int]:
    """For every group with a limit: the limit less what is used, file caches not counted as used."""
    membership = proc / "self" / "cgroup"
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names = cgroup, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root, names = cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        for group in _group_and_parents(root, path):
            yield from _group_available_bytes(group, *names)


def _group_and_parents(root: Path, path: str) -> Iterator[Path]:
    """A container may see its host's path, which does not exist in it; its own group then is the root."""
    group = root / path.lstrip("/")
    while group != root:
        yield group
        group = group.parent
    yield root


def _group_available_bytes(group: Path, limit_file: str, usage_file: str, prefix: str) -> Iterator[int]:
    try:
        limit = (group / limit_file).read_text().strip()
        usage = int((group / usage_file).read_text())
        stat = _read_table(group / "memory.stat")
    except OSError:
        return
    if limit != "max":
        cached = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
        yield max(0, int(limit) - usage + cached)


def _process_available_bytes(proc: Path) -> Iterator[int]:
    """For each limit of this process (`ulimit -v`, `ulimit -d`): the limit less what is taken."""
    import resource  # absent on Windows

    usage = _read_table(proc / "self" / "status")
    for limit_kind, field in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit, _ = resource.getrlimit(limit_kind)
        if limit != resource.RLIM_INFINITY:
            yield max(0, limit - usage[field] * 1024)


def _read_table(path: Path) -> dict[str, int]:
    """The first two columns of a file of `name number` lines; other lines are passed over."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def total_memory_bytes() -> int | None:
    """All of the machine's memory; None where nobody says."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _windows_available_bytes() -> int | None:
    """GlobalMemoryStatusEx: learn.microsoft.com/windows/win32/api/sysinfoapi/ns-sysinfoapi-memorystatusex."""
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load_percent", ctypes.c_uint32),
            ("total_physical", ctypes.c_uint64),
            ("available_physical", ctypes.c_uint64),
            ("page_file_and_virtual", ctypes.c_uint64 * 5),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009 - absent from ctypes elsewhere, for mypy too
    return int(status.available_physical) if kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
