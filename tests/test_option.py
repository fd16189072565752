from __future__ import annotations

import math

import numpy as np
import pytest

from fastserve.errors import OptionError
from fastserve.option import INT32_MAX, check_integer, check_number


@pytest.mark.parametrize("value", [0, 7, INT32_MAX, np.int64(7)])
def test_whole_numbers_within_the_range_pass(value: object) -> None:
    check_integer("top_k", value, low=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "top_k=-1 is out of range (hint: choose a whole number of at least 0)"),
        (2**31, "top_k=2147483648 is out of range (hint: choose a whole number of at most 2147483647)"),
        (1.0, "top_k=1.0 is not a whole number (hint: choose one of at least 0)"),
        (True, "top_k=True is not a whole number (hint: choose one of at least 0)"),
    ],
)
def test_other_integers_are_refused_with_the_limit_that_they_break(value: object, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_integer("top_k", value, low=0)
    assert str(caught.value) == message


def test_a_limit_is_written_to_its_last_digit() -> None:
    with pytest.raises(OptionError, match="at most 18446744073709551615"):
        check_integer("seed", 2**64, low=0, high=2**64 - 1)


@pytest.mark.parametrize("value", [0.0, 1.1, math.nan, -math.inf])
def test_numbers_outside_a_half_open_range_are_refused(value: float) -> None:
    check_number("top_p", 1.0, 0.0, 1.0, is_low_open=True)
    with pytest.raises(OptionError, match="choose a number above 0 and at most 1"):
        check_number("top_p", value, 0.0, 1.0, is_low_open=True)


def test_a_closed_range_holds_its_ends() -> None:
    check_number("min_p", 0.0, 0.0, 1.0)
    with pytest.raises(OptionError, match=r"min_p=-0\.5 is out of range .*of at least 0 and at most 1"):
        check_number("min_p", -0.5, 0.0, 1.0)
