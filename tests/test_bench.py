"""The benchmarks: that they start, and that their arithmetic is right."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("fastserve._native")

BENCH = Path(__file__).resolve().parent.parent / "bench"
SCRIPTS = [
    "busy_neighbour.py",
    "compress_archive.py",
    "compress_sparse_decode.py",
    "decode_against_llama_cpp.py",
    "huge_pages.py",
    "install_size.py",
    "peers.py",
    "prepare_large.py",
    "random_projections.py",
    "quality.py",
    "serve_abuse.py",
    "serve_against_peers.py",
    "serve_intruder.py",
    "serve_watched.py",
    "sparsity.py",
    "start.py",
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the benchmarks, first on the import path as for a script in it."""
    monkeypatch.syspath_prepend(BENCH)
    return BENCH


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_tells_its_options(script: str) -> None:
    result = subprocess.run(
        [sys.executable, BENCH / script, "--help"], capture_output=True, text=True, check=True
    )
    assert "--json FILE" in result.stdout


def test_the_index_lists_every_benchmark() -> None:
    index = (BENCH / "README.md").read_text(encoding="utf-8")
    assert [script for script in SCRIPTS if f"python bench/{script}" in index] == SCRIPTS


def test_kl_divergence_is_that_computed_by_hand(bench: Path) -> None:
    quality = load("quality")
    expected = quality.log_softmax(np.log(np.asarray([[1, 1], [3, 1]], np.float32)))
    actual = quality.log_softmax(np.log(np.asarray([[1, 3], [3, 1]], np.float32)))
    # 1/2 log((1/2) / (1/4)) + 1/2 log((1/2) / (3/4)) = 1/2 log(4/3)
    assert quality.kl_divergence(expected, actual) == pytest.approx([0.5 * math.log(4 / 3), 0.0], abs=1e-7)


def test_log_softmax_does_not_overflow(bench: Path) -> None:
    logs = load("quality").log_softmax(np.asarray([[1000.0, 1000.0]], np.float32))
    assert logs.tolist() == [[math.log(0.5)] * 2]


def test_first_tokens_are_counted_up_to_the_first_difference(bench: Path) -> None:
    count_same = load("decode_against_llama_cpp").count_same
    assert count_same([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert count_same([1, 2], [1, 2]) == 2


def test_files_and_bytecode_are_counted_apart(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "__pycache__").mkdir(parents=True)
    (tmp_path / "one" / "code.py").write_bytes(b"x" * 100)
    (tmp_path / "one" / "__pycache__" / "code.cpython-311.pyc").write_bytes(b"x" * 40)
    (tmp_path / "single.py").write_bytes(b"x" * 7)
    files, bytecode = load("install_size").measure(tmp_path)
    assert files == {"one": 100, "single.py": 7}
    assert bytecode == {"one": 40}


def test_the_command_names_options_but_no_paths(bench: Path) -> None:
    arguments = Namespace(
        json=Path("out.json"),
        peer_python=Path("/home/me/python"),
        weights=["int8", "bf16"],
        prompt="a b",
        n=None,
    )
    assert load("report").command_line("x.py", arguments) == (
        "python bench/x.py --peer-python PEER_PYTHON --weights int8 bf16 --prompt 'a b'"
    )


def test_an_answer_is_whole_or_an_error_object(bench: Path) -> None:
    abuse = load("serve_abuse")
    good = b'data: {"choices": [{"finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
    error = b'{"error": {"message": "m", "type": "t", "param": null, "code": "step_failed"}}'
    assert abuse.check_stream(good) == "whole stream"
    assert abuse.check_stream(b"data: %s\n\n" % error) == "ended by step_failed"
    assert abuse.check_error(429, error, {429}) == "429 step_failed"
    for content in (good[:-1], b"", b'data: {"choices": [{"finish_reason": null}]}\n\ndata: [DONE]\n\n'):
        with pytest.raises(abuse.DefectError):
            abuse.check_stream(content)
    for status, content in ((200, error), (429, b"no"), (429, b'{"error": {"message": "m"}}')):
        with pytest.raises(abuse.DefectError):
            abuse.check_error(status, content, {429})


def test_what_is_left_at_the_end_is_a_leak(bench: Path) -> None:
    leaks = load("serve_abuse").leaks
    start = dict.fromkeys(("sequences", "blocks_owned", "slow_blocks_used", "requests_under_way"), 0)
    start |= {"tasks": 3, "descriptors": 20, "threads": 9, "memory_bytes": 100 * 2**20}
    assert leaks({"start": start, "warm": start, "end": {**start, "memory_bytes": 110 * 2**20}}) == []
    for name, value in {
        "sequences": 1,
        "blocks_owned": 2,
        "requests_under_way": 1,
        "tasks": 4,
        "descriptors": 21,
        "threads": 99,
    }.items():
        assert len(leaks({"start": start, "warm": start, "end": {**start, name: value}})) == 1
    assert leaks({"start": start, "warm": start, "end": {**start, "memory_bytes": 2**28}}) != []


def test_policies_change_between_portions_of_requests(bench: Path) -> None:
    portions = load("serve_abuse").portions
    assert portions(1300, 300) == [300, 500, 500]
    assert sum(portions(10_000, 2_000)) == 10_000


def test_rates_of_servers_are_compared_where_both_were_searched(bench: Path) -> None:
    ratios = load("serve_against_peers").ratios
    measured = {"fastserve": {"rate_held": 3.0}, "llama.cpp": {"rate_held": 0.5}, "vllm": {"rows": []}}
    assert ratios(measured) == {"llama.cpp": 6.0}
    assert ratios({"vllm": {"rate_held": 1.0}}) == {}


def test_a_corpus_is_prepared_in_little_memory_and_checked(bench: Path) -> None:
    command = [sys.executable, bench / "prepare_large.py", "--size", "3MB", "--memory", "1MiB"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "peak of memory" in run.stdout
