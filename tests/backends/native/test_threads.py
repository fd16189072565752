from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastserve import _native
from fastserve.backends.native.executable import (
    NativeExecutable,
    compile_native,
    make_runtime,
    max_threads,
)
from fastserve.errors import OptionError
from fastserve.graph.passes import optimize
from fastserve.types import Limits
from parity import Run, run_logits, step_together, store_f32
from tiny_models import LLAMA_CONFIG, random_parameters, tiny_graph

LIMITS = Limits(max_tokens=128, max_outputs=128, max_sequences=4, num_blocks=64, max_context=512)
IDS = [i * 7 % 97 for i in range(100)]


def compile_with(threads: int) -> NativeExecutable:
    graph = tiny_graph(LLAMA_CONFIG)
    return compile_native(
        optimize(graph), store_f32(random_parameters(graph)), limits=LIMITS, threads=threads
    )


def test_any_number_of_threads_gives_the_same_bits() -> None:
    expected = run_logits(compile_with(1), IDS)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(run_logits(compile_with(threads), IDS), expected)


def test_the_default_is_the_cores_that_the_process_may_use() -> None:
    graph = tiny_graph(LLAMA_CONFIG)
    executable = compile_native(optimize(graph), store_f32(random_parameters(graph)), limits=LIMITS)
    assert executable.num_threads == _native.count_cores().num_threads >= 1


def test_more_threads_than_cores_run_thousands_of_steps_without_losing_one() -> None:
    """Late wake-ups, sleeps and claims of other runs' tiles: the pool's races show under oversubscription."""
    crowded, alone = compile_with(16), compile_with(1)
    runs = Run(crowded), Run(alone)
    for token in np.random.default_rng(0).integers(0, 97, size=400).tolist():
        results = [step_together([(run, [token])])[0] for run in runs]
        np.testing.assert_array_equal(*results)


def test_pools_of_several_executables_do_not_disturb_each_other() -> None:
    expected = run_logits(compile_with(1), IDS)
    failures: list[str] = []

    def run_often() -> None:
        executable = compile_with(3)
        for _ in range(20):
            if not np.array_equal(run_logits(executable, IDS), expected):
                failures.append("different logits")

    threads = [threading.Thread(target=run_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_step_releases_the_interpreter_lock() -> None:
    executable = compile_with(1)
    done = threading.Event()

    def run_steps() -> None:
        for _ in range(50):
            run_logits(executable, IDS)
        done.set()

    worker = threading.Thread(target=run_steps)
    worker.start()
    ticks = 0
    while not done.is_set():
        time.sleep(0.0005)
        ticks += 1
    worker.join()
    assert ticks > 3  # held, the lock would come free only between two of the runs


@pytest.mark.parametrize("isa", _native.runnable_isas())
def test_a_forced_instruction_set_is_the_one_that_runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_ISA", isa)
    assert compile_with(1).isa == isa


def test_an_instruction_set_that_the_cpu_lacks_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match="unknown instruction set 'abacus'") as unknown:
        make_runtime(isa="abacus")
    compiled = unknown.value.message.partition("compiled in: ")[2].split(", ")
    assert set(_native.runnable_isas()) <= set(compiled)
    lacking = set(compiled) - set(_native.runnable_isas())
    if not lacking:
        pytest.skip("this CPU has every instruction set that is compiled in")
    for isa in lacking:
        with pytest.raises(OptionError, match=f"this CPU lacks the instruction set '{isa}'"):
            make_runtime(isa=isa)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs the time that threads ran")
def test_workers_that_sleep_are_woken_for_the_next_step() -> None:
    before = seconds_by_thread().keys()
    executable = compile_with(2)
    (worker,) = seconds_by_thread().keys() - before
    for _ in range(3):
        time.sleep(0.2)  # far longer than a worker spins
        asleep = seconds_by_thread()[worker]
        deadline = time.monotonic() + 20
        while seconds_by_thread()[worker] == asleep:  # others may have the cores when it is woken
            assert time.monotonic() < deadline
            run_logits(executable, IDS)


def seconds_by_thread() -> dict[str, float]:
    """How long each thread of this process has been on a core."""
    folders = Path("/proc/self/task").iterdir()
    return {folder.name: int((folder / "schedstat").read_text().split()[0]) / 1e9 for folder in folders}


def test_more_threads_than_help_anyone_are_refused_with_the_limit() -> None:
    assert max_threads() >= max(64, 4 * _native.count_cores().num_cpus)
    with pytest.raises(OptionError, match="threads=100000 is out of range") as caught:
        make_runtime(threads=100_000)
    assert caught.value.hint == f"choose a whole number of at most {max_threads()}"


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux counts the stacks of threads as address space"
)
def test_threads_that_the_system_does_not_give_are_an_error_and_the_process_lives_on() -> None:
    code = """
import resource
from pathlib import Path
from fastserve.backends.native.executable import make_runtime
from fastserve.errors import OptionError

taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 100 * 2**20, resource.RLIM_INFINITY))
try:
    make_runtime(threads=64)  # whose stacks take 8 MiB each
except OptionError as error:
    print(error)
print(make_runtime(threads=2).num_threads)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, num_threads = done.stdout.splitlines()
    assert message.startswith("threads=64 could not be started: ")
    assert "ulimit" in message
    assert num_threads == "2"


def test_two_threads_cannot_run_one_executable_at_once() -> None:
    executable = compile_with(1)
    refusals: list[str] = []
    deadline = time.monotonic() + 20

    def run_steps() -> None:
        while not refusals and time.monotonic() < deadline:  # others may keep the two from meeting for long
            try:
                run_logits(executable, IDS)
            except RuntimeError as error:
                refusals.append(str(error))

    threads = [threading.Thread(target=run_steps) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(refusals) == {"the plan is running a step in another thread"}
    np.testing.assert_array_equal(run_logits(executable, IDS), run_logits(compile_with(1), IDS))
