from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.clock import Interval, SteadyClock


@given(st.lists(st.floats(-1e6, 1e6), min_size=2))
def test_time_never_runs_backwards_and_as_fast_as_the_clock_forwards(times) -> None:
    readings = iter(times)
    clock = SteadyClock(lambda: next(readings))
    steady = [clock() for _ in times]
    for (before, after), (steady_before, steady_after) in zip(pairwise(times), pairwise(steady), strict=True):
        elapsed = max(after - before, 0.0)
        assert abs(steady_after - steady_before - elapsed) < 1e-6


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=50).map(sorted))
def test_what_is_done_at_intervals_is_done_no_sooner_and_at_the_first_look_after_them(times) -> None:
    interval = Interval(10.0)
    done = [now for now in times if interval.is_over(now)]
    assert done[0] == times[0]
    assert all(after - before >= 10.0 for before, after in pairwise(done))
    for now in times:
        assert min(abs(now - before) for before in done if before <= now) <= 10.0
    assert interval.is_over(-1e6), "a jump back waits for nothing"
