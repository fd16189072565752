from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastserve.engine.available_memory import available_memory_bytes

MIB = 2**20


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 1,000 MiB available and no control groups."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal: {4000 * 1024} kB\nMemAvailable: {1000 * 1024} kB\nHugePages_Total: 0\n"
    )
    (tmp_path / "proc/self/status").write_text(
        f"Name: python\nVmSize: {300 * 1024} kB\nVmData: {200 * 1024} kB\n"
    )
    return tmp_path


def available(machine: Path) -> int | None:
    return available_memory_bytes(proc=machine / "proc", cgroup=machine / "cgroup")


def write_group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def test_without_control_groups_the_machine_says_what_is_available(machine: Path) -> None:
    assert available(machine) == 1000 * MIB


def test_a_groups_limit_counts_less_what_is_used_but_for_file_caches(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/app\n")
    stat = f"anon {100 * MIB}\nactive_file {30 * MIB}\ninactive_file {20 * MIB}"
    files = {"memory.max": 500 * MIB, "memory.current": 150 * MIB, "memory.stat": stat}
    write_group(machine / "cgroup/app", files)
    assert available(machine) == 400 * MIB


def test_the_limit_of_an_enclosing_group_counts_too(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/slice/app\n")
    unlimited = {"memory.max": "max", "memory.current": 10 * MIB, "memory.stat": "anon 0"}
    write_group(machine / "cgroup/slice/app", unlimited)
    write_group(machine / "cgroup/slice", unlimited | {"memory.max": 300 * MIB})
    assert available(machine) == 290 * MIB


def test_groups_of_the_first_version_are_read(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("5:cpu:/\n4:memory:/app\n")
    files = {
        "memory.limit_in_bytes": 200 * MIB,
        "memory.usage_in_bytes": 50 * MIB,
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {10 * MIB}",
    }
    write_group(machine / "cgroup/memory/app", files)
    assert available(machine) == 160 * MIB


def test_in_a_container_the_path_of_the_host_leads_to_the_root(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/docker/0123\n")
    files = {"memory.max": 64 * MIB, "memory.current": 0, "memory.stat": "anon 0"}
    write_group(machine / "cgroup", files)
    assert available(machine) == 64 * MIB


def test_a_group_over_its_limit_leaves_nothing(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/app\n")
    files = {"memory.max": 5 * MIB, "memory.current": 6 * MIB, "memory.stat": "anon 0"}
    write_group(machine / "cgroup/app", files)
    assert available(machine) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
@pytest.mark.parametrize(("limited", "left"), [("RLIMIT_AS", 400 * MIB), ("RLIMIT_DATA", 500 * MIB)])
def test_a_limit_of_the_process_counts_less_what_it_has_taken(
    machine: Path, monkeypatch: pytest.MonkeyPatch, limited: str, left: int
) -> None:
    import resource

    def getrlimit(kind: int) -> tuple[int, int]:
        soft = 700 * MIB if kind == getattr(resource, limited) else resource.RLIM_INFINITY
        return soft, resource.RLIM_INFINITY

    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    assert available(machine) == left


def test_this_machine_has_some_memory() -> None:
    num_bytes = available_memory_bytes()
    assert num_bytes is None or num_bytes > 2**20
