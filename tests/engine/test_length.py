"""Distributions of completions' lengths, learned by kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.length import Kind, LengthDistribution, OutputLengths, next_mark


def test_what_is_left_is_counted_over_the_longer_ones_alone() -> None:
    lengths = LengthDistribution(np.array([10.0] * 50 + [100.0] * 50))
    assert lengths.mean_left(0) == 55.0
    assert lengths.mean_left(next_mark(10)) == 100.0 - next_mark(10)


def test_past_all_that_were_seen_the_rest_is_about_as_long_again() -> None:
    lengths = LengthDistribution(np.array([10.0] * 50))
    mark = next_mark(1000)
    assert 0.25 * mark < lengths.mean_left(mark) < 2 * mark


@given(st.lists(st.integers(1, 5000), min_size=40, max_size=80), st.floats(1e-6, 10.0))
def test_the_moment_is_between_those_of_the_mean_and_of_the_longest(lengths, price) -> None:
    distribution = LengthDistribution(np.array(lengths, np.float64))
    moment = distribution.log_moment(0, price)
    slack = 1.03  # prices are rounded to powers of 1.05
    assert price * np.mean(lengths) / slack <= moment + 1e-9
    assert moment <= price * max(lengths) * slack


def test_a_moment_of_huge_exponents_does_not_overflow() -> None:
    assert math.isfinite(LengthDistribution(np.array([1e5] * 20)).log_moment(0, 100.0))


def test_two_sorts_of_lengths_are_judged_by_the_likely_short_one_until_it_is_past() -> None:
    """Of a mixture of 1 and 1000, the Gittins index asks for one token first: a half chance at its price."""
    lengths = LengthDistribution(np.array([1.0] * 50 + [1000.0] * 50))
    assert lengths.least_ratio(0, 0.0, 1.0) == pytest.approx(2.0, rel=0.05)
    assert lengths.least_ratio(1, 0.0, 1.0) == pytest.approx(999.0, rel=0.05)
    assert lengths.least_ratio(0, 10.0, 1.0) == pytest.approx(22.0, rel=0.05)


def observed(*kinds: tuple[Kind, int], times: int = 200) -> OutputLengths:
    """Of kinds with their one length."""
    lengths = OutputLengths()
    for _ in range(times):
        for kind, num_tokens in kinds:
            lengths.observe(kind, num_tokens)
    return lengths


def mean(lengths: OutputLengths, *kind: str) -> float:
    return lengths.of(kind).mean_left(0)


def test_kinds_are_told_apart_once_enough_of_them_have_ended() -> None:
    unknown = mean(OutputLengths(), "new")
    lengths = observed((("short",), 10), (("long",), 1000))
    assert (mean(lengths, "short"), mean(lengths, "long")) == (10.0, 1000.0)
    assert unknown != mean(lengths, "new") == pytest.approx(505.0, rel=0.1)


def test_two_endpoints_of_a_tenant_are_told_apart_and_a_new_one_begins_as_its_tenant() -> None:
    lengths = observed((("a", "chat"), 10), (("a", "summary"), 1000), (("b", "chat"), 5000))
    assert (mean(lengths, "a", "chat"), mean(lengths, "a", "summary")) == (10.0, 1000.0)
    assert mean(lengths, "b", "chat") == 5000.0
    assert mean(lengths, "a", "new") == mean(lengths, "a") == 505.0
    assert mean(lengths, "new", "chat") == mean(lengths, "new") > 1500


@pytest.mark.parametrize(("num_ended", "low", "high"), [(1, 10, 45), (31, 100, 200), (32, 500, 500)])
def test_an_endpoint_moves_from_its_tenant_s_lengths_to_its_own(num_ended, low, high) -> None:
    """Of 200 of 10 tokens, and so many of 500 that count twice, as the tenant's too."""
    lengths = observed((("b",), 5000), (("a", "chat"), 10))
    for _ in range(num_ended):
        lengths.observe(("a", "new"), 500)
    assert low <= mean(lengths, "a", "new") <= high


def test_a_class_of_a_predictor_begins_as_its_endpoint() -> None:
    lengths = observed((("a", "chat", "x"), 10), (("a", "summary", "x"), 1000))
    assert mean(lengths, "a", "chat", "new") == 10.0


def test_kinds_are_forgotten_beyond_a_number_those_within_before_wider_ones() -> None:
    rng = np.random.default_rng(0)
    lengths = OutputLengths()
    for num_names in rng.integers(1, 4, 5000):
        kind = tuple(map(str, rng.integers(0, 60, num_names)))
        lengths.observe(kind, 100)
        assert len(lengths) <= 1024
        assert kind in lengths._kinds
    assert len(lengths) == 1024
    assert all(kind[:-1] in lengths._kinds for kind in lengths._kinds if len(kind) > 1)


def test_a_shift_of_lengths_is_followed_within_a_window() -> None:
    lengths = OutputLengths()
    for _ in range(2000):
        lengths.observe(("",), 10)
    assert lengths.of(("",)).mean_left(0) == 10.0
    for _ in range(1300):
        lengths.observe(("",), 500)
    assert lengths.of(("",)).mean_left(0) == 500.0


def test_a_kind_speaks_for_itself_as_soon_as_enough_of_it_have_ended() -> None:
    lengths = OutputLengths()
    for _ in range(10_000):
        lengths.observe(("short",), 10)
    lengths.observe(("long",), 1000)
    assert mean(lengths, "long") < 100.0
    for _ in range(40):
        lengths.observe(("long",), 1000)
    assert mean(lengths, "long") == 1000.0
