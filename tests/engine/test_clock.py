from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.clock import SteadyClock


@given(st.lists(st.floats(-1e6, 1e6), min_size=2))
def test_time_never_runs_backwards_and_as_fast_as_the_clock_forwards(times) -> None:
    readings = iter(times)
    clock = SteadyClock(lambda: next(readings))
    steady = [clock() for _ in times]
    for (before, after), (steady_before, steady_after) in zip(pairwise(times), pairwise(steady), strict=True):
        elapsed = max(after - before, 0.0)
        assert abs(steady_after - steady_before - elapsed) < 1e-6
