"""The cores that a process may use, on machines that are folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve import _native
from fastserve.backends.native.cores import Cores


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Four cores of two threads each, cores 0 and 1 on the first of two nodes; no quota."""
    for cpu in range(8):
        write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings(cpu))
    write(tmp_path / "sys/devices/system/node/has_cpu", "0-1")
    write(tmp_path / "sys/devices/system/node/node0/cpulist", "0-1,4-5")
    write(tmp_path / "sys/devices/system/node/node1/cpulist", "2,3,6,7")
    write(tmp_path / "proc/self/cgroup", "0::/app/worker")
    return tmp_path


def siblings(cpu: int) -> str:
    return f"{cpu % 4},{cpu % 4 + 4}"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def count(machine: Path, cpus: list[int]) -> _native.Cores:
    return _native.count_cores(str(machine), cpus)


def test_siblings_are_one_core(machine: Path) -> None:
    cores = count(machine, list(range(8)))
    assert (cores.num_cpus, cores.num_cores, cores.num_nodes, cores.num_threads) == (8, 4, 2, 4)


def test_the_affinity_mask_decides_which_cores_count(machine: Path) -> None:
    assert count(machine, [0, 4]).num_threads == 1
    assert count(machine, [0, 1, 6]).num_threads == 3
    assert count(machine, [0, 1, 5]).num_nodes == 1


@pytest.mark.parametrize(
    ("folder", "text", "threads"),
    [
        ("sys/fs/cgroup/app/worker", "max 100000", 4),
        ("sys/fs/cgroup/app/worker", "250000 100000", 2),
        ("sys/fs/cgroup/app", "350000 100000", 3),
        ("sys/fs/cgroup", "50000 100000", 1),
        ("sys/fs/cgroup/elsewhere", "50000 100000", 4),
    ],
)
def test_a_quota_of_any_group_above_counts(machine: Path, folder: str, text: str, threads: int) -> None:
    write(machine / folder / "cpu.max", text)
    assert count(machine, list(range(8))).num_threads == threads


def test_the_least_of_several_quotas_counts(machine: Path) -> None:
    write(machine / "sys/fs/cgroup/app/cpu.max", "200000 100000")
    write(machine / "sys/fs/cgroup/app/worker/cpu.max", "300000 100000")
    assert count(machine, list(range(8))).quota == 2.0


def test_quotas_of_the_first_version_of_cgroups_count(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "5:cpuset:/\n4:cpu,cpuacct:/app\n0::/")
    write(machine / "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us", "220000")
    write(machine / "sys/fs/cgroup/cpu/app/cpu.cfs_period_us", "100000")
    assert count(machine, list(range(8))).quota == 2.2
    write(machine / "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us", "-1")
    assert count(machine, list(range(8))).quota == 0


def test_a_system_that_tells_nothing_has_as_many_cores_as_the_mask(tmp_path: Path) -> None:
    cores = count(tmp_path, [0, 1, 2])
    assert (cores.num_cores, cores.num_nodes, cores.num_threads) == (3, 1, 3)


def test_siblings_nodes_and_a_quota_are_told_where_there_are_any() -> None:
    plain = Cores(cpus=2, physical_cores=2, numa_nodes=1, quota=None, threads=2)
    assert str(plain) == "2 cores"
    large = Cores(cpus=8, physical_cores=4, numa_nodes=2, quota=1.5, threads=1)
    assert "4 cores, 8 hardware threads (SMT siblings" in str(large)
    assert "2 NUMA nodes" in str(large)
    assert str(large).endswith("a quota of 1.5 CPUs")
