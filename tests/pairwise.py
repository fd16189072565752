"""Fewer tests with the same reach, for builds on which all of them take hours (`make test-sanitize`).

Of a parametrized test, those cases are kept that hold every pair of values of its parameters: each
instruction set with each format, each format with each size, each size with each instruction set. Most
defects need two values to meet, hardly any three (Kuhn, Wallace, Gallo: "Software Fault Interactions", IEEE
TSE 30, 2004).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations

Case = Mapping[str, Hashable]
Pair = frozenset[tuple[str, Hashable]]


def covering_cases(cases: Sequence[Case]) -> list[int]:
    """The indices of cases that together hold every pair of values that the cases hold, in order.

    Cases of one parameter, or of none, are all kept.

    >>> covering_cases([{"a": a, "b": b, "c": c} for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    [0, 3, 5, 6]
    """
    missing = {index: _pairs(case) for index, case in enumerate(cases)}
    chosen = [index for index, pairs in missing.items() if not pairs]
    for index in chosen:
        del missing[index]
    while missing:
        best = max(missing, key=lambda index: (len(missing[index]), -index))
        covered = missing.pop(best)
        chosen.append(best)
        missing = {index: left for index, pairs in missing.items() if (left := pairs - covered)}
    return sorted(chosen)


def _pairs(case: Case) -> frozenset[Pair]:
    sets: Iterable[Pair] = map(frozenset, combinations(case.items(), min(2, len(case))))
    return frozenset(pair for pair in sets if pair)
