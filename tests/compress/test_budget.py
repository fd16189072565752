"""Budgets: how they are read, and what keeps them."""

from __future__ import annotations

import json

import pytest

from fastserve.compress.budget import parse_budget
from fastserve.errors import OptionError


def test_limits_are_read_in_their_units() -> None:
    budget = parse_budget("size<=60MB, quality >= -1%  decode<=8ms memory<=1GiB prefill<=0.5s kl<=0.01")
    values = {limit.name: limit.value for limit in budget.limits}
    assert values == {
        "size": 60e6,
        "quality": -0.01,
        "decode": 8.0,
        "memory": 2.0**30,
        "prefill": 500.0,
        "kl": 0.01,
    }


def test_a_size_may_be_a_share_of_the_source() -> None:
    budget = parse_budget("size<=22% agreement>=99%")
    met = {"size": 20.0, "source_size": 100.0, "agreement": 0.99}
    assert all(verdict.is_met for verdict in budget.check(met))
    assert budget.excess(met) == 0.0
    verdicts = budget.check({"size": 33.0, "source_size": 100.0, "agreement": 0.9})
    assert [verdict.is_met for verdict in verdicts] == [False, False]
    assert [verdict.text for verdict in verdicts] == ["size<=22%: 33.00%", "agreement>=99%: 90.00%"]
    json.dumps([verdict.to_json() for verdict in verdicts])


def test_excess_adds_up_what_is_missed() -> None:
    budget = parse_budget("size<=100B quality>=-1%")
    assert budget.excess({"size": 150.0, "quality": -0.04}) == pytest.approx(0.5 + 0.03)
    assert budget.excess({"size": 100.0, "quality": -0.01}) == 0.0


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "there is no limit", "size<=60MB"),
        ("small", "'small' is no limit", "size<=60MB"),
        ("size<=60MB and fast", "'and fast' is no limit", "size<=60MB"),
        ("sise<=60MB", "'sise' cannot be limited", "did you mean size?"),
        ("xyz<=60MB", "'xyz' cannot be limited", "limits are size<=, memory<=, quality>="),
        ("size>=60MB", "compares by >=", "write size<=60MB"),
        ("quality<=-1%", "compares by <=", "write quality>=-1%"),
        ("size<=60", "has no unit", "units are B, kB, MB"),
        ("decode<=8MB", "has the unit 'MB'", "units are us, ms, s"),
        ("kl<=1%", "has the unit '%'", "leave the unit out"),
        ("size<=-1MB", "is below 0", "bytes of the weights"),
        ("size<=1MB size<=2MB", "size is limited twice", "stricter"),
        ("quality>=150%", "twice as good", "below 0 is worse"),
    ],
)
def test_what_is_no_budget_is_said(text: str, message: str, hint: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        parse_budget(text)
    assert hint in (caught.value.hint or "")
    assert caught.value.option == "budget"
