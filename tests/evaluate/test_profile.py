from __future__ import annotations

import pytest

pytest.importorskip("fastserve._native")

from evaluate_machine import make_limits

from fastserve.backends.native.executable import CallProfile
from fastserve.evaluate.profile import PROFILE_HEADER, group_calls, profile_rows


def test_calls_are_summed_by_op_and_shape_longest_first() -> None:
    calls = [
        CallProfile("rms_norm", "", 2, 0.5, 10, 0),
        CallProfile("linear", "8x4", 2, 1.0, 100, 400),
        CallProfile("linear", "4x8", 2, 4.0, 100, 400),
        CallProfile("linear", "8x4", 3, 2.0, 200, 800),
        CallProfile("sample", "", 0, 0.0, 0, 0),
    ]
    profiles = group_calls(calls)
    assert [(p.op, p.shape, p.runs) for p in profiles] == [
        ("linear", "4x8", 2),
        ("linear", "8x4", 5),
        ("rms_norm", "", 2),
    ]
    assert (profiles[1].bytes_per_second, profiles[1].operations_per_second) == (100.0, 400.0)


def test_rows_give_shares_of_the_time_and_of_the_limits() -> None:
    limits = make_limits(read_bytes_per_second=10e9, int8_operations_per_second=2e12)
    profiles = group_calls([CallProfile("linear", "8x4", 1, 1.0, int(5e9), int(1e12))])
    (row,) = profile_rows(profiles, limits)
    assert dict(zip(PROFILE_HEADER, row, strict=True)) == {
        "op": "linear",
        "shape": "8x4",
        "runs": "1",
        "ms": "1000.0",
        "share of time": "100.0%",
        "GB/s": "5.0",
        "TOP/s": "1.000",
        "of read limit": "50%",
        "of int8 limit": "50%",
    }
