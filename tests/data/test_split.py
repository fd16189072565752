from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.data import ProblemLog, Row, check_splits, find_leaks, split_data
from fastserve.errors import DataError, OptionError


def rows_of(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"text {index}", "label": label} for index, label in enumerate(labels)]


@settings(deadline=None)  # it says how busy the machine is
@given(st.integers(0, 200), st.floats(0, 0.4), st.floats(0, 0.4), st.integers(0, 9), st.booleans())
def test_every_row_is_in_one_split_and_the_sizes_are_as_asked(
    num_rows: int, dev: float, test: float, seed: int, stratify: bool
) -> None:
    rows = rows_of([index % 7 for index in range(num_rows)])
    splits = split_data(rows, dev_ratio=dev, test_ratio=test, seed=seed, stratify=stratify)
    texts = [row["text"] for part in splits.values() for row in part]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    slack = 8 if stratify else 1  # of 7 labels, each rounded, and one row of each stays in train
    assert abs(len(splits["dev"]) - dev * num_rows) <= slack
    assert abs(len(splits["test"]) - test * num_rows) <= slack


def test_the_seed_alone_decides() -> None:
    rows = rows_of([0] * 50)
    assert split_data(rows, seed=1) == split_data(rows, seed=1)
    assert split_data(rows, seed=1) != split_data(rows, seed=2)


def test_labels_have_their_share_of_each_split_and_rare_ones_are_in_train() -> None:
    labels = ["a"] * 80 + ["b"] * 20 + ["c"]
    splits = split_data(rows_of(labels), dev_ratio=0.2, test_ratio=0.1, stratify=True)
    counts = {name: Counter(row["label"] for row in part) for name, part in splits.items()}
    assert (counts["dev"]["a"], counts["dev"]["b"]) == (16, 4)
    assert (counts["test"]["a"], counts["test"]["b"]) == (8, 2)
    assert counts["train"]["c"] == 1


@settings(deadline=None)  # it says how busy the machine is
@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(0, 5), st.booleans())
def test_groups_stay_together(groups: list[int], seed: int, stratify: bool) -> None:
    rows = [{"text": str(at), "label": at % 2, "author": group} for at, group in enumerate(groups)]
    splits = split_data(rows, group="author", dev_ratio=0.2, seed=seed, stratify=stratify)
    where = [{row["author"] for row in part} for part in splits.values()]
    assert sum(map(len, where)) == len(set(groups))


def test_many_groups_fill_the_splits_as_asked_without_those_of_dev_being_the_smallest() -> None:
    rows = [{"text": "", "author": group} for group in range(100) for _ in range(1 + group % 5)]
    splits = split_data(rows, group="author", dev_ratio=0.2, test_ratio=0.1)
    assert abs(len(splits["dev"]) - 60) <= 5
    assert abs(len(splits["test"]) - 30) <= 5
    sizes = Counter(row["author"] for row in splits["dev"])
    assert 2 < sum(sizes.values()) / len(sizes) < 4  # three on average over all


@pytest.mark.parametrize(
    "times", [list(range(20)), [f"2026-11-{day:02}T10:00:00+02:00" for day in range(1, 21)]]
)
def test_the_earliest_are_train_and_the_latest_test(times: list[Any]) -> None:
    rows = [{"text": str(time), "date": time} for time in times]
    splits = split_data(rows[::-1], time="date", dev_ratio=0.2, test_ratio=0.1)
    order = [row["date"] for name in ("train", "dev", "test") for row in reversed(splits[name])]
    assert order == times
    assert [len(part) for part in splits.values()] == [14, 4, 2]


def test_rows_of_one_moment_are_not_parted() -> None:
    rows = [{"text": str(at), "date": at // 8} for at in range(20)]
    splits = split_data(rows, time="date", dev_ratio=0.2, test_ratio=0.1)
    assert [{row["date"] for row in part} for part in splits.values()] == [{0, 1}, {2}, set()]


def test_a_row_without_its_group_or_time_is_named() -> None:
    with pytest.raises(DataError, match="row 2: no field 'author' to group by"):
        split_data([{"text": "a", "author": 1}, {"text": "b"}], group="author")
    with pytest.raises(DataError, match="row 1: field 'date' is no time: 'soon'"):
        split_data([{"text": "a", "date": "soon"}], time="date")


@pytest.mark.parametrize(
    "options",
    [{"dev_ratio": 0.6, "test_ratio": 0.4}, {"dev_ratio": -0.1}, {"time": "date", "stratify": True}],
)
def test_splits_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        split_data([], **options)


def test_leaks_are_found_equal_and_alike() -> None:
    text = "The quick brown fox jumps over the lazy dog near the river bank at noon today."
    splits = {
        "train": [{"text": text}, {"text": "something else altogether, and longer than a few words"}],
        "dev": [{"text": "unseen text of dev that nothing is like"}],
        "test": [{"text": f"  {text} "}, {"text": text.replace("noon", "dusk").upper()}],
    }
    assert [(leak.split, leak.other_split) for leak in find_leaks(splits)] == [("train", "test")]
    leaks = find_leaks(splits, threshold=0.7)
    assert [(leak.other_row.line, round(leak.similarity, 1)) for leak in leaks] == [(1, 1.0), (2, 0.8)]
    assert find_leaks(splits, threshold=0.95)[-1].similarity == 1.0


def test_splits_of_files_are_checked_for_shared_texts_and_unseen_labels() -> None:
    def row(text: str, label: str, line: int, file: str) -> Row:
        return Row({"text": text, "label": label}, file=file, line=line)

    splits = {
        "train": [
            row("a", "x", 1, "train.tsv"),
            row("b", "x", 2, "train.tsv"),
            row("c", "y", 3, "train.tsv"),
        ],
        "dev": [row("b ", "x", 1, "dev.tsv"), row("d", "z", 2, "dev.tsv")],
        "test": [row("e", "y", 1, "test.tsv")],
    }
    with pytest.raises(DataError, match=r"train.tsv:2: the text is that of dev.tsv:1 too"):
        check_splits(splits, ProblemLog())
    with pytest.raises(DataError, match=r"dev.tsv:2: label 'z' is not in training"):
        check_splits(splits, ProblemLog({"split-overlap": "drop"}))
    log = ProblemLog({"split-overlap": "drop", "unseen-label": "drop"})
    checked = check_splits(splits, log)
    assert {name: [row.line for row in rows] for name, rows in checked.items()} == {
        "train": [1, 3],
        "dev": [1],
        "test": [1],
    }
    assert check_splits(splits, ProblemLog({"split-overlap": "keep", "unseen-label": "keep"})) == splits
