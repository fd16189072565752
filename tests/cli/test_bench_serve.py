from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")

from fake_server import Behaviour, run_fake_server
from fastserve.cli.main import main

TRAFFIC = ["--model", "m", "--trace", "short-chat", "--length-scale", "0.1", "--max-completion-tokens", "6"]
COMMAND = ["bench", "serve", *TRAFFIC, "--requests", "30", "--warm-up", "0"]


def test_a_server_is_told_by_a_document_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    with run_fake_server() as server:
        command = [*COMMAND, "--url", server.url, "--rate", "100,200", "--slo", "ttft_p99=5"]
        assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ignores_eos"] is True
    assert document["slo"] == {"ttft_p99": 5.0}
    assert [row["rate"] for row in document["rows"]] == [100.0, 200.0]
    for row in document["rows"]:
        assert row["num_finished"] == row["num_requests"] == 30
        assert row["failures"] == {}
        assert row["slo_is_held"] is True
        assert 0 < row["ttft_mean_seconds"] <= row["ttft_p99_seconds"] <= row["e2e_p99_seconds"]
        assert row["client_cpu_seconds"] > 0
        assert {"itl_p99_seconds", "gap_p99_seconds", "goodput_per_second", "tpot_p50_seconds"} <= row.keys()


def test_a_server_is_told_by_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with run_fake_server(Behaviour(status=429, num_good=12, refuses=("ignore_eos",))) as server:
        assert main([*COMMAND, "--url", f"{server.url}/v1", "--rate", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, row = (line.split("\t") for line in lines[:2])
    assert header[:4] == ["load", "finished", "failed", "req/s"]
    assert row[0] == "200/s"
    assert int(row[1]) + int(row[2]) == 30
    assert "the server does not take ignore_eos: completions may be shorter than planned" in lines
    assert lines[-1] == f"200/s: {row[2]} x http 429 queue_full: try later"


def test_so_many_requests_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with run_fake_server() as server:
        assert main([*COMMAND, "--url", server.url, "--concurrency", "3", "--api", "chat", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert (row["rate"], row["concurrency"], row["num_finished"]) == (None, 3, 30)
    assert server.most_at_once == 3
    assert "messages" in server.bodies[-1]


def test_the_highest_rate_is_searched(capsys: pytest.CaptureFixture[str]) -> None:
    with run_fake_server(Behaviour(slots=1, token_seconds=0.01)) as server:
        command = [*COMMAND, "--url", server.url, "--find-rate", "--rate", "40", "--slo", "e2e_mean=0.12"]
        assert main([*command, "--precision", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rate_held"] < document["rate_missed"] <= 2 * document["rate_held"]
    assert {row["slo_is_held"] for row in document["rows"]} == {True, False}


def test_the_key_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTSERVE_API_KEY", "fs-secret")
    with run_fake_server() as server:
        assert main([*COMMAND, "--url", server.url, "--rate", "300", "--json"]) == 0
    assert {headers["authorization"] for headers in server.headers} == {"Bearer fs-secret"}
    assert "fs-secret" not in capsys.readouterr().out


def test_nothing_answered_is_said_and_ends_with_an_error_code(capsys: pytest.CaptureFixture[str]) -> None:
    with run_fake_server(Behaviour(status=500, num_good=2)) as server:
        assert main([*COMMAND, "--url", server.url, "--rate", "300", "--json"]) == 2
    printed = capsys.readouterr()
    row = json.loads(printed.out)["rows"][0]
    assert row["failures"] == {"http 500 queue_full": 30}
    assert row["failure_messages"] == {"http 500 queue_full": "try later"}
    assert printed.err.startswith("error: no request was answered whole")


def test_charts_are_written_where_they_are_wanted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with run_fake_server() as server:
        command = [*COMMAND, "--url", server.url, "--rate", "200,300", "--plot", str(tmp_path / "charts")]
        assert main(command) == 0
    names = {path.stem for path in (tmp_path / "charts").glob("*.svg")}
    assert names == {"ttft_mean", "ttft_p99", "normalized_mean", "e2e_mean", "itl_p99", "goodput"}


def test_charts_that_cannot_be_written_are_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with run_fake_server() as server:
        command = [*COMMAND, "--url", server.url, "--rate", "200", "--plot"]
        assert main([*command, str(tmp_path / "file")]) == 2
        assert f"{tmp_path / 'file'}: " in capsys.readouterr().err
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert main([*command, str(tmp_path / "charts")]) == 2
        assert "plots need matplotlib" in capsys.readouterr().err
    assert server.bodies == []


def test_results_are_told_where_charts_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    charts = tmp_path / "charts"

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(charts / "ttft_mean.svg"))

    monkeypatch.setattr("fastserve.evaluate.load_plot.plot_rows", fail)
    with run_fake_server() as server:
        command = [*COMMAND, "--url", server.url, "--rate", "200", "--plot", str(charts), "--json"]
        assert main(command) == 2
    printed = capsys.readouterr()
    assert [row["num_finished"] for row in json.loads(printed.out)["rows"]] == [30]
    assert printed.err.startswith(f"error: {charts / 'ttft_mean.svg'}: No space left on device; ")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_search_that_finds_no_rate_tells_what_it_measured(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastserve.evaluate.find_rate._MOST_TRIALS", 2)
    with run_fake_server() as server:
        command = [*COMMAND, "--url", server.url, "--find-rate", "--rate", "200", "--slo", "e2e_mean=60"]
        assert main([*command, *(["--json"] if as_json else [])]) == 2
    printed = capsys.readouterr()
    if as_json:
        document = json.loads(printed.out)
        assert [row["rate"] for row in document["rows"]] == [200.0, 400.0]
        assert "rate_held" not in document
    else:
        loads = [line.split("\t")[0] for line in printed.out.splitlines()]
        assert loads == ["load", "200/s", "400/s"]
    assert printed.err == "error: the SLO still holds at 400 requests a second; begin at a higher --rate\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no way to send requests is chosen"),
        (["--rate", "1", "--concurrency", "2"], "--rate and --concurrency exclude each other"),
        (["--find-rate", "--time-scale", "2"], "--time-scale and --find-rate exclude each other"),
        (["--rate", "fast"], "rate='fast' is not a list of numbers"),
        (["--rate", "0"], "rate=0.0 is out of range"),
        (["--rate", ""], "rate='' is not a list of numbers"),
        (["--find-rate", "--rate", ""], "rate='' is not a list of numbers"),
        (["--concurrency", ""], "concurrency='' is not a list of numbers"),
        (["--rate", "1", "--slo", ""], "slo='' bounds no figure"),
        (["--rate", "1", "--prompts", ""], "is no data set of prompts"),
        (["--concurrency", "0"], "concurrency=0 is out of range"),
        (["--find-rate", "--rate", "50,2"], "--find-rate begins at one rate, and --rate gives 2"),
        (["--find-rate", "--precision", "-1"], "precision=-1.0 is out of range"),
        (["--find-rate", "--precision", "0"], "precision=0.0 is out of range"),
        (["--rate", "1", "--precision", "0.05"], "--precision has no effect without --find-rate"),
        (["--concurrency", "2", "--burstiness", "1"], "--burstiness has no effect with --concurrency"),
        (["--concurrency", "2", "--seconds", "60"], "--seconds has no effect with --concurrency"),
        (["--rate", "1", "--url", "nowhere"], "url='nowhere' is no address of a server"),
        (["--rate", "1", "--slo", "ttft=1"], "slo='ttft=1' bounds no figure"),
        (["--rate", "1", "--trace", "nope"], "no trace is at nope"),
        (["--time-scale", "1"], "time_scale=1 needs a trace with times"),
        (["--rate", "1", "--url", "http://127.0.0.1:9"], "does not answer: connection refused"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--url", "http://127.0.0.1:9", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
