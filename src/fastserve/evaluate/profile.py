"""What the calls of a plan did, summed by op and shape, against the machine's limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastserve.backends.native.executable import CallProfile
from fastserve.evaluate.machine import MachineLimits

# Ops that multiply with a matrix of weights.
LINEARS = (
    "linear",
    "linear_activation",
    "linear_gated_activation",
    "expert_gated_activation",
    "expert_linear",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpProfile:
    """All calls of one op and shape; bytes and operations are the least that they had to do."""

    op: str
    shape: str
    runs: int
    seconds: float
    bytes: int
    operations: int

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0

    @property
    def operations_per_second(self) -> float:
        return self.operations / self.seconds if self.seconds else 0.0


def group_calls(calls: Iterable[CallProfile]) -> list[OpProfile]:
    """The calls by op and shape, longest first; those that never ran are left out."""
    groups: dict[tuple[str, str], list[CallProfile]] = {}
    for call in calls:
        if call.runs:
            groups.setdefault((call.op, call.shape), []).append(call)
    profiles = [
        OpProfile(
            op=op,
            shape=shape,
            runs=sum(call.runs for call in group),
            seconds=sum(call.seconds for call in group),
            bytes=sum(call.bytes for call in group),
            operations=sum(call.operations for call in group),
        )
        for (op, shape), group in groups.items()
    ]
    return sorted(profiles, key=lambda profile: -profile.seconds)


PROFILE_HEADER = (
    "op",
    "shape",
    "runs",
    "ms",
    "share of time",
    "GB/s",
    "TOP/s",
    "of read limit",
    "of int8 limit",
)


def profile_rows(profiles: Sequence[OpProfile], limits: MachineLimits) -> list[tuple[str, ...]]:
    """The profile as a table under PROFILE_HEADER. Data in a cache may be read faster than memory."""
    total = sum(profile.seconds for profile in profiles)
    return [
        (
            profile.op,
            profile.shape,
            str(profile.runs),
            f"{profile.seconds * 1e3:.1f}",
            f"{profile.seconds / total:.1%}",
            f"{profile.bytes_per_second / 1e9:.1f}",
            f"{profile.operations_per_second / 1e12:.3f}",
            f"{profile.bytes_per_second / limits.read_bytes_per_second:.0%}",
            f"{profile.operations_per_second / limits.int8_operations_per_second:.0%}",
        )
        for profile in profiles
    ]
