"""Splits of rows into train, dev and test: at random, by label, by group, by time. A seed decides it all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from fastserve.data.digest import value_key
from fastserve.data.row import Row, labels_of
from fastserve.errors import DataError, OptionError
from fastserve.option import INT64_MAX, check_integer, check_number

SPLITS = ("train", "dev", "test")

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """How rows are split.

    Attributes:
        dev_ratio, test_ratio: of all rows; the rest is train.
        stratify: give every label its share of each split; labels with too few rows stay in train.
        group: a field; rows that have it equal stay together.
        time: a field with a number or an ISO 8601 date; the earliest rows are train, the latest test.
        seed: of everything that is drawn.

    Raises:
        OptionError: a ratio is out of range, nothing is left for train, or time stands beside another way.
    """

    dev_ratio: float = 0.1
    test_ratio: float = 0.1
    stratify: bool = False
    group: str | None = None
    time: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("dev_ratio", self.dev_ratio, 0, 1)
        check_number("test_ratio", self.test_ratio, 0, 1)
        check_integer("seed", self.seed, low=0, high=INT64_MAX)
        if self.dev_ratio + self.test_ratio >= 1:
            raise OptionError(
                f"dev_ratio={self.dev_ratio} and test_ratio={self.test_ratio} leave nothing for train",
                hint="choose ratios whose sum is below 1",
                option="dev_ratio",
            )
        if self.time is not None and (self.stratify or self.group is not None):
            raise OptionError(
                "time leaves no choice for stratify or group",
                hint="choose one way to split",
                option="time",
            )

    @property
    def ratios(self) -> tuple[float, float, float]:
        return 1 - self.dev_ratio - self.test_ratio, self.dev_ratio, self.test_ratio


def split_data(
    rows: Sequence[Mapping[str, Any]],
    *,
    dev_ratio: float = 0.1,
    test_ratio: float = 0.1,
    stratify: bool = False,
    group: str | None = None,
    time: str | None = None,
    seed: int = 0,
) -> dict[str, list[Any]]:
    """Split rows into {"train", "dev", "test"}, each in the order of `rows`. See `SplitOptions`.

    Rows with equal texts may part; `find_leaks` finds them.

    >>> rows = [{"text": str(number), "label": number % 2} for number in range(10)]
    >>> {name: len(part) for name, part in split_data(rows, stratify=True, dev_ratio=0.2).items()}
    {'train': 7, 'dev': 2, 'test': 1}

    Raises:
        DataError: a row lacks the field of group or time, or its time cannot be read.
        OptionError: an option is out of range.
    """
    options = SplitOptions(dev_ratio, test_ratio, stratify, group, time, seed)
    placed = [row if isinstance(row, Row) else Row(row, line=at) for at, row in enumerate(rows, start=1)]
    strata = np.array([stratum_key(row) for row in placed], np.uint64) if stratify else None
    groups = None if group is None else np.array([group_key(row, group) for row in placed], np.uint64)
    times = None if time is None else np.array([time_of(row, time) for row in placed])
    splits = assign_splits(len(rows), options, strata=strata, groups=groups, times=times)
    return {
        name: [rows[int(at)] for at in np.flatnonzero(splits == index)] for index, name in enumerate(SPLITS)
    }


def assign_splits(
    num_rows: int,
    options: SplitOptions,
    *,
    strata: _Array | None = None,
    groups: _Array | None = None,
    times: _Array | None = None,
) -> _Array:
    """The split of each row, uint8 [rows]: an index into SPLITS. Keys are uint64 [rows], times floats."""
    generator = np.random.default_rng(options.seed)
    if times is not None:
        return _by_time(times, options.ratios)
    if groups is not None:
        return _by_group(groups, strata, options.ratios, generator)
    if strata is not None:
        return _by_stratum(strata, options.ratios, generator)
    splits = np.zeros(num_rows, np.uint8)
    ends = np.rint(np.cumsum(options.ratios) * num_rows).astype(int)
    order = generator.permutation(num_rows)
    splits[order[ends[0] : ends[1]]] = 1
    splits[order[ends[1] :]] = 2
    return splits


def stratum_key(row: Mapping[str, Any]) -> int:
    """By what a row is stratified: its label, or all of them; numbers that are measures count as one."""
    return value_key(sorted(str(label) for label in labels_of(row) if not isinstance(label, float)))


def group_key(row: Row, field: str) -> int:
    """By what a row is grouped. Raises DataError where it has no such field."""
    if field not in row:
        raise DataError(
            f"{row.place}: no field {field!r} to group by", hint="name a field that all rows have"
        )
    return value_key(row[field])


def time_of(row: Row, field: str) -> float:
    """When a row is, in its own unit or in seconds. Raises DataError where it says no time."""
    value = row.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        return float(str(value))
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError as error:
        raise DataError(
            f"{row.place}: field {field!r} is no time: {value!r}",
            hint="give numbers, or dates such as 2026-11-27T20:00:00",
        ) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _by_time(times: _Array, ratios: Sequence[float]) -> _Array:
    """The earliest first; rows of one time stay together, in the earlier split."""
    order = np.argsort(times, kind="stable")
    ordered = times[order]
    splits = np.zeros(len(times), np.uint8)
    for index, end in enumerate(np.rint(np.cumsum(ratios)[:2] * len(times)).astype(int), start=1):
        if 0 < end < len(times):
            splits[order[np.searchsorted(ordered, ordered[end - 1], side="right") :]] = index
        elif end == 0:
            splits[:] = index
    return splits


def _by_stratum(strata: _Array, ratios: Sequence[float], generator: np.random.Generator) -> _Array:
    """Each stratum's share, rounded so that the sums are right; train has one row of each at least."""
    splits = np.zeros(len(strata), np.uint8)
    order = generator.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    starts = np.flatnonzero(np.diff(strata[order])) + 1
    carried = np.zeros(2)
    for part in np.split(order, starts):
        wanted = len(part) * np.array(ratios[1:]) + carried
        taken = np.maximum(np.rint(wanted), 0).astype(int)
        while taken.sum() >= len(part) > 0 and taken.sum() > 0:
            taken[np.argmax(taken)] -= 1
        carried = np.clip(wanted - taken, -1, 1)
        splits[part[: taken[0]]] = 1
        splits[part[taken[0] : taken.sum()]] = 2
    return splits


def _by_group(
    groups: _Array, strata: _Array | None, ratios: Sequence[float], generator: np.random.Generator
) -> _Array:
    """Each group goes where the largest part is missing of what it has, among the splits that it fits into.
    Groups that are large for the smallest split come first, others in any order."""
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if strata is None:
        stratum_of, num_strata = np.zeros(len(groups), np.int64), 1
    else:
        kinds, stratum_of = np.unique(strata, return_inverse=True)
        num_strata = len(kinds)
    shares = np.array(ratios)
    missing = np.outer(shares, np.bincount(stratum_of, minlength=num_strata))  # [splits, strata]
    rows_of = np.split(np.argsort(group_of, kind="stable"), np.cumsum(sizes)[:-1])
    splits = np.zeros(len(groups), np.uint8)
    is_large = sizes > min(share for share in ratios if share > 0) * len(groups) / 2
    shuffled = generator.permutation(len(sizes))
    for group in shuffled[np.argsort(-(sizes * is_large)[shuffled], kind="stable")]:
        rows = rows_of[group]
        kinds_in, counts = np.unique(stratum_of[rows], return_counts=True)
        lack = (missing[:, kinds_in] * counts).sum(axis=1) / len(rows)
        does_fit = missing.sum(axis=1) >= len(rows)
        chosen = int(np.argmax(np.where(does_fit, lack / np.maximum(shares, 1e-9), -np.inf)))
        if not does_fit.any():
            chosen = int(np.argmax(missing.sum(axis=1)))
        splits[rows] = chosen
        missing[chosen, kinds_in] -= counts
    return splits
