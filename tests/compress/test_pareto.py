"""Fronts, against all choices tried one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.compress.pareto import front, front_of_sums

values = st.integers(0, 8)
options = st.lists(st.tuples(values, values), min_size=1, max_size=4)


@settings(deadline=None)  # a busy machine takes what it takes
@given(st.lists(options, min_size=1, max_size=4))
def test_a_front_of_sums_is_that_of_all_choices(groups: list[list[tuple[int, int]]]) -> None:
    sums = {
        tuple(np.sum([group[index] for group, index in zip(groups, picked, strict=True)], axis=0).tolist())
        for picked in product(*(range(len(group)) for group in groups))
    }
    best = {
        one
        for one in sums
        if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in sums)
    }
    found = front_of_sums(groups)
    assert {(choice.size, choice.loss) for choice in found} == best
    assert [choice.size for choice in found] == sorted(choice.size for choice in found)
    for choice in found:
        picked = [group[index] for group, index in zip(groups, choice.options, strict=True)]
        assert (choice.size, choice.loss) == tuple(np.sum(picked, axis=0))


def test_of_equals_one_is_on_the_front() -> None:
    assert front(["a", "b", "c"], [(1, 1), (1, 1), (2, 2)]) == ["a"]
