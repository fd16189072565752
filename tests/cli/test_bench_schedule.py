from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.cli.bench_schedule import split_policies
from fastserve.cli.main import main

COMMAND = ["bench", "schedule", "--trace", "short-chat", "--requests", "64", "--cost", "a100"]


def test_policies_are_compared_by_a_document_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    command = [*COMMAND, "--policy", "fcfs,mlfq:growth=4,margin=3", "--load", "0.5,0.9", "--seeds", "2"]
    assert main([*command, "--processes", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["rows"]
    keys = [(row["policy"], row["load"], row["seed"]) for row in rows]
    assert keys == [
        (policy, load, seed)
        for policy in ("fcfs", "mlfq:growth=4,margin=3")
        for load in (0.5, 0.9)
        for seed in (0, 1)
    ]
    for row in rows:
        assert row["unfinished"] == row["refused"] == 0
        assert 0 < row["ttft_mean_seconds"] <= row["ttft_p99_seconds"] <= row["e2e_p99_seconds"]
        assert row["e2e_mean_seconds"] >= row["ttft_mean_seconds"]
        assert {"gap_p99_seconds", "goodput_per_second", "preemptions_per_request"} <= row.keys()
    assert [ratio["load"] for ratio in document["ratios_to_first"]] == [0.5, 0.9]
    assert document["machine"]["name"] == "a100"


def test_policies_are_compared_by_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--policy", "fcfs,sjf", "--processes", "1"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:4] == ["policy", "load", "seed", "TTFT mean"]
    assert [line[0] for line in lines[1:]] == ["fcfs", "sjf", "", "ratio of", "sjf"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "lifo"], "policy 'lifo' is unknown; choose one of fcfs"),
        (["--policy", "mlfq:speed=3"], "policy 'mlfq' has no knob 'speed'"),
        (["--policy", "fcfs", "--load", "much"], "load='much' is not a list of numbers"),
        (["--policy", "fcfs", "--load", "-1"], "load=-1.0 is out of range"),
        (["--policy", "fcfs", "--cost", "tpu"], "cost 'tpu' is neither cpu nor a100"),
        (["--policy", "fcfs", "--requests", "1"], "requests=1 is out of range"),
        (["--policy", "fcfs", "--trace", "nope"], "no trace is at nope"),
        (["--policy", "fcfs", "--tpot-objective", "0"], "tpot_seconds=0.0 is out of range"),
        (["--policy", "fcfs", "--kv-tokens", "32"], "requests fit the machine's 32 KV tokens"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_invariants_are_checked_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    command = [*COMMAND, "--policy", "mlfq", "--kv-tokens", "8192", "--requests", "32", "--check", "--json"]
    assert main([*command, "--processes", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["unfinished"] == 0


def test_charts_are_written_where_they_are_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "charts"
    assert main([*COMMAND, "--policy", "fcfs", "--processes", "1", "--plot", str(folder)]) == 0
    assert len(list(folder.glob("*.svg"))) == 5


def test_commas_part_policies_and_the_knobs_of_one() -> None:
    assert split_policies("mlfq:growth=4,margin=3,fcfs, sjf") == ("mlfq:growth=4,margin=3", "fcfs", "sjf")
