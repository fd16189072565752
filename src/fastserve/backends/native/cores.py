"""The cores that this process may use, for reports."""

from __future__ import annotations

from dataclasses import dataclass

import fastserve._native as _native


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Hardware threads of the affinity mask, the physical cores and NUMA nodes that they lie in, the CPUs'
    worth of time that cgroups grant (None: all), and the threads that are started by default: one for each
    physical core, as far as the quota feeds them."""

    cpus: int
    physical_cores: int
    numa_nodes: int
    quota: float | None
    threads: int

    def __str__(self) -> str:
        parts = [f"{self.physical_cores} cores"]
        if self.cpus > self.physical_cores:
            parts.append(f"{self.cpus} hardware threads (SMT siblings, which get no threads of ours)")
        if self.numa_nodes > 1:
            parts.append(f"{self.numa_nodes} NUMA nodes, over which weights are dealt out")
        if self.quota is not None:
            parts.append(f"a quota of {self.quota:g} CPUs")
        return ", ".join(parts)


def count_cores() -> Cores:
    """What this process may use, as the affinity mask and the cgroups are now."""
    found = _native.count_cores()
    return Cores(
        cpus=found.num_cpus,
        physical_cores=found.num_cores,
        numa_nodes=found.num_nodes,
        quota=found.quota or None,
        threads=found.num_threads,
    )
