from __future__ import annotations

from itertools import combinations, product

import pytest

from pairwise import Case, covering_cases


def pairs(cases: list[Case]) -> set[frozenset[tuple[str, object]]]:
    return {frozenset(pair) for case in cases for pair in combinations(case.items(), 2)}


@pytest.mark.parametrize("sizes", [(2, 2), (5, 6, 8), (3, 4, 2, 5)])
def test_every_pair_of_values_is_kept_in_far_fewer_cases(sizes: tuple[int, ...]) -> None:
    cases: list[Case] = [dict(zip("abcd", values, strict=False)) for values in product(*map(range, sizes))]
    chosen = [cases[index] for index in covering_cases(cases)]
    assert pairs(chosen) == pairs(cases)
    assert len(chosen) <= (1.5 * sorted(sizes)[-1] * sorted(sizes)[-2])


def test_pairs_that_no_case_has_are_not_asked_for() -> None:
    cases: list[Case] = [{"a": 0, "b": 1, "c": 0}, {"a": 1, "b": 0, "c": 0}, {"a": 1, "b": 0, "c": 0}]
    assert covering_cases(cases) == [0, 1]


def test_tests_of_one_parameter_or_none_are_kept_whole() -> None:
    assert covering_cases([{}]) == [0]
    assert covering_cases([{"a": 0}, {"a": 1}]) == [0, 1]
