"""The search for a highest rate, on a server whose rate is known."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import MeasurementError, OptionError
from fastserve.evaluate.find_rate import find_rate


def search(capacity: float, *, start: float, precision: float = 0.05) -> tuple[float, float]:
    async def holds_at(rate: float) -> bool:
        return rate <= capacity

    return asyncio.run(find_rate(holds_at, start=start, precision=precision))


@given(capacity=st.floats(0.01, 1000), start=st.floats(0.01, 1000))
def test_the_rates_found_lie_around_the_servers_and_close_together(capacity: float, start: float) -> None:
    held, missed = search(capacity, start=start)
    assert held <= capacity < missed <= 1.05 * held * (1 + 1e-9)


@pytest.mark.parametrize(("capacity", "message"), [(0.0, "holds at no rate"), (1e12, "still holds at")])
def test_a_server_without_a_highest_rate_is_an_error(capacity: float, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        search(capacity, start=1.0)


@pytest.mark.parametrize("precision", [-1.0, 0.0, 1.5, float("nan")])
def test_a_precision_that_ends_no_search_is_refused(precision: float) -> None:
    with pytest.raises(OptionError, match="precision"):
        search(10.0, start=1.0, precision=precision)
