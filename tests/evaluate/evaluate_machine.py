"""Limits of a machine that there is not."""

from __future__ import annotations

from typing import Any

from fastserve.evaluate.machine import MIB, MachineLimits


def make_limits(**values: Any) -> MachineLimits:
    defaults: dict[str, Any] = {
        "isa": "fake",
        "threads": 2,
        "working_set_bytes": MIB,
        "read_kernel": "plain",
        "read_bytes_per_second": 1.0,
        "int8_operations_per_second": 1.0,
        "f32_operations_per_second": 1.0,
    }
    return MachineLimits(**{**defaults, **values})
