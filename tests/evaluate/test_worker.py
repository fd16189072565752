from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("fastserve._native")

from fastserve.errors import MeasurementError, OptionError
from fastserve.evaluate import worker as worker_module
from fastserve.evaluate.worker import PEERS, EngineKind, Worker, find_peers

KIND = EngineKind(name="fake", module="engine_fake", needs="json", form="any")
ENGINE = """
import os, sys, time
class Engine:
    version, weights = "7", "int7"
    def __init__(self, job):
        print("noise on standard output")
        if job.get("dies"):
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        self.missing = job.get("missing", 0)
    def generate(self, prompts, max_tokens):
        time.sleep(0.05)
        return [[1] * (max_tokens - self.missing) for _ in prompts]
"""


@pytest.fixture(autouse=True)
def fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of peers that holds one fake engine beside the real worker."""
    script = worker_module._SCRIPT
    (tmp_path / "worker.py").write_text(script.read_text())
    (tmp_path / "engine_fake.py").write_text(ENGINE)
    monkeypatch.setattr(worker_module, "_SCRIPT", tmp_path / "worker.py")


def test_a_run_is_timed_whatever_the_engine_prints() -> None:
    with Worker(KIND, Path(sys.executable)) as worker:
        assert worker.open({}) == ("7", "int7")
        assert 0.05 <= worker.generate([[1, 2], [3]], 4) < 5


def test_completions_of_another_length_are_an_error() -> None:
    with Worker(KIND, Path(sys.executable)) as worker:
        worker.open({"missing": 1})
        with pytest.raises(MeasurementError, match="3"):
            worker.generate([[1]], 4)


def test_an_engine_that_dies_is_an_error_with_its_last_words() -> None:
    expected = pytest.raises(MeasurementError, match="fake ended with exit code 3 on 'open': out of luck")
    with Worker(KIND, Path(sys.executable)) as worker, expected:
        worker.open({"dies": True})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_a_python_process_at_least() -> None:
    with Worker(KIND, Path(sys.executable)) as worker:
        worker.open({})
        assert 5e6 < worker.peak_memory_bytes() < 1e9


def test_an_unknown_peer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        find_peers(["lama.cpp"], [])
    assert "'lama.cpp'" in caught.value.message
    assert all(name in str(caught.value.hint) for name in PEERS)


def test_a_peer_that_no_interpreter_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        PEERS, "fake", EngineKind(name="fake", module="x", needs="no_such_module", form="any")
    )
    with pytest.raises(OptionError, match=r"fake is not installed: .* cannot import no_such_module"):
        find_peers(["fake"], [Path(sys.executable)])


def test_the_first_interpreter_that_has_a_peer_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "fake", KIND)
    assert find_peers(["fake"], [Path(sys.executable)]) == {"fake": Path(sys.executable)}


def test_an_interpreter_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="python-not-here cannot be run"):
        find_peers(["vllm"], [tmp_path / "python-not-here"])
