"""The rows of a run are checked across its splits: what train and dev share, and what dev alone has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastserve.cli.main import main
from fastserve.data import Problem
from fastserve.errors import DataError
from fastserve.evaluate.task.table import TaskOptions
from fastserve.tune.rows import RunRows, read_run_rows
from tune.conftest import film_rows

WriteRows = Callable[[str, list[dict[str, Any]]], Path]

TRAIN = [
    {"text": "a fine film", "label": "y"},
    {"text": "a dull  film", "label": "n"},
    {"text": "a bore", "label": "n"},
    {"text": "a joy to see", "label": "y"},
]


def read(train: Path, dev: Path, task: str = "text-classification", **on_problem: str) -> RunRows:
    actions = {name.replace("_", "-"): action for name, action in on_problem.items()}
    return read_run_rows(task, train, dev, TaskOptions(max_length=32), on_problem=actions)


def test_texts_that_train_and_dev_share_are_fatal_all_told_with_file_and_line(write_rows: WriteRows) -> None:
    train = write_rows("train", TRAIN)
    dev = write_rows("dev", [{"text": "a dull film", "label": "n"}, {"text": "a fine film", "label": "y"}])
    with pytest.raises(DataError) as told:
        read(train, dev)
    assert f"{train}:1: the text is that of {dev}:2 too; {train}:2: the text is that of {dev}:1" in str(
        told.value
    )
    assert "split-overlap=drop" in str(told.value.hint)


def test_a_shared_row_leaves_training_or_stays_as_the_option_says(write_rows: WriteRows) -> None:
    train, dev = write_rows("train", TRAIN), write_rows("dev", TRAIN[:1])
    dropped = read(train, dev, split_overlap="drop")
    assert [row["text"] for row in dropped.train] == ["a dull  film", "a bore", "a joy to see"]
    assert [row["text"] for row in dropped.dev or ()] == ["a fine film"]
    message = f"the text is that of {dev}:1 too"
    assert list(dropped.problems) == [Problem("split-overlap", str(train), 1, message, "drop")]
    kept = read(train, dev, split_overlap="keep")
    assert [row.line for row in kept.train] == [1, 2, 3, 4]
    assert kept.problem_counts == {"split-overlap (keep)": 1}


def test_dev_that_is_all_of_train_leaves_nothing_to_learn(write_rows: WriteRows) -> None:
    rows = write_rows("rows", TRAIN)
    with pytest.raises(DataError, match=r"all rows of .*rows.jsonl are in .*rows.jsonl too"):
        read(rows, rows, split_overlap="drop")


def test_one_sentence_with_other_entities_is_another_row_of_relations(write_rows: WriteRows) -> None:
    ann, bob, rome = ({"start": at, "end": at + n} for at, n in ((0, 3), (8, 3), (15, 4)))
    pairs = [(ann, bob, "met"), (ann, rome, "in"), (bob, rome, "in")]
    rows = [
        {"text": "Ann met Bob in Rome", "head": head, "tail": tail, "label": label}
        for head, tail, label in pairs
    ]
    train, dev = write_rows("train", rows[:2]), write_rows("dev", rows[2:])
    assert not read(train, dev, "relation-extraction").problems


def test_a_label_of_dev_alone_is_told_and_dropped_as_the_option_says(write_rows: WriteRows) -> None:
    train = write_rows("train", TRAIN)
    dev = write_rows("dev", [{"text": "so so", "label": "m"}, {"text": "a joy", "label": "y"}])
    with pytest.raises(DataError, match=re.escape(f"{dev}:1: label 'm' is not in training")):
        read(train, dev)
    assert [row.line for row in read(train, dev, unseen_label="drop").dev or ()] == [2]


def test_numbers_are_no_labels_that_training_must_have(write_rows: WriteRows) -> None:
    train = write_rows("train", [{"text": "so so", "label": 2.5}, {"text": "a joy", "label": 5}])
    dev = write_rows("dev", [{"text": "a bore", "label": 1}])
    assert not read(train, dev).problems
    whole = write_rows("whole", [{"text": "so so", "label": 1}, {"text": "a joy", "label": 5}])
    names = write_rows("names", [{"text": "a bore", "label": "5"}])  # as a CSV file has it
    assert not read(whole, names).problems


def test_the_command_prints_problems_and_keeps_them_beside_the_curves(
    tiny_encoder: Path, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, output = write_rows("train", film_rows(24)), tmp_path / "out"
    dev = write_rows("dev", film_rows(2))
    command = ["tune", "text-classification", "--model", str(tiny_encoder), "--train", str(train)]
    command += ["--dev", str(dev), "--output", str(output), "--device", "cpu", "--max-steps", "1", "--json"]
    assert main(command) == 2
    assert f"{train}:1: the text is that of {dev}:1 too" in capsys.readouterr().out
    assert not output.exists()
    assert main([*command, "--on-problem", "split-overlap=drop"]) == 0
    told = capsys.readouterr()
    assert f"{train}:1: the text is that of {dev}:1 too [split-overlap: drop]" in told.err
    number = json.loads(told.out)["problems"]["split-overlap (drop)"]
    stored = (output / "training" / "problems.jsonl").read_text("utf-8").splitlines()
    assert number == len(stored) >= 2
    assert json.loads(stored[0])["line"] == 1
    assert (
        json.loads((output / "fastserve.json").read_text("utf-8"))["lineage"]["rows"]["train"] == 24 - number
    )
