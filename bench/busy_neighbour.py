"""What one busy Python thread costs a step, in this process and in another, beyond the CPU that it takes.

A step is a run of the plan: of a decoder one token, 64 at once or a prompt of 512, of an encoder 32 sentences
of 64 tokens. Steps alone and beside a neighbour run in turns; the neighbour counts its own CPU time. Of C
cores it leaves C - share to the step, which may take C / (C - share) times as long: `excess` is how much
longer than that it took. After a step, a thread of this process has to give the interpreter back first,
which it does after `--switch-interval`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from fastserve.backends.native.cores import count_cores
from fastserve.backends.native.executable import compile_native
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.engine.encoder import EncoderInput, build_encoder_batch
from fastserve.evaluate.estimate import Estimate, estimate_median
from fastserve.evaluate.kernel_speed import make_batch
from fastserve.graph.passes import optimize
from fastserve.hub.resolve import resolve
from fastserve.models.family import build_graph, read_config
from fastserve.serve.run import SWITCH_SECONDS
from fastserve.types import Batch, Limits
from report import DEFAULT_MODEL, make_parser, publish

CONTEXT = 512
SENTENCES, SENTENCE_TOKENS = 32, 64
BLOCK_SIZE = 32
DECODER_LIMITS = Limits(
    max_tokens=CONTEXT, max_outputs=1, max_sequences=1, num_blocks=CONTEXT // BLOCK_SIZE, max_context=CONTEXT
)
ENCODER_LIMITS = Limits(
    max_tokens=SENTENCES * SENTENCE_TOKENS,
    max_sequences=SENTENCES,
    num_blocks=SENTENCES * SENTENCE_TOKENS // BLOCK_SIZE,
    max_context=SENTENCE_TOKENS,
)
# Batches of the decoder, by how many tokens end the context; then those of the encoder.
DECODER_STEPS = {"decode": 1, "rows-64": 64, "prefill": CONTEXT}
ENCODER_STEP = "sentences"
SPIN = "import sys, time\nprint(flush=True)\nwhile True: pass"


class Thread:
    """A thread of this process that computes without end, but while it is stopped."""

    def __init__(self) -> None:
        self._ends = threading.Event()
        self._cpu_seconds = 0.0
        self._thread = threading.Thread(target=self._spin)
        self._thread.start()

    def _spin(self) -> None:
        while not self._ends.is_set():
            sum(range(1000))
        self._cpu_seconds = time.thread_time()

    def stop(self) -> float:
        """Seconds of CPU that it took."""
        self._ends.set()
        self._thread.join()
        return self._cpu_seconds


class Process:
    """A process that computes without end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self._before = self._cpu_seconds()

    def _cpu_seconds(self) -> float:
        return time.clock_gettime(
            ~self._process.pid << 3 | 2
        )  # the CPU clock of a process: clock_getcpuclockid(3)

    def stop(self) -> float:
        """Seconds of CPU that it took since it was ready."""
        spent = self._cpu_seconds() - self._before
        self._process.kill()
        self._process.communicate()
        return spent


NEIGHBOURS = {"thread of this process": Thread, "another process": Process}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the decoder")
    parser.add_argument("--encoder", default="all-minilm-l6-v2")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int, default=count_cores().threads)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.6, help="of steps, alone and beside the neighbour")
    steps = [*DECODER_STEPS, ENCODER_STEP]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps)
    parser.add_argument(
        "--switch-interval",
        type=float,
        default=SWITCH_SECONDS,
        help="seconds that a thread may keep the interpreter from others (sys.setswitchinterval); by default "
        "as in `fastserve serve`, while Python has 0.005",
    )
    arguments = parser.parse_args()
    sys.setswitchinterval(arguments.switch_interval)
    results: dict[str, Any] = {}
    rows: list[tuple[str, object]] = []
    num_cores = count_cores().physical_cores
    for step in arguments.steps:
        executable, batch = make_step(step, arguments)
        for neighbour, kind in NEIGHBOURS.items():
            slowdowns, shares, excesses = [], [], []
            for _ in range(arguments.pairs):
                alone = time_steps(executable, batch, arguments.seconds)
                with busy(kind) as spent:
                    start = time.perf_counter()
                    beside = time_steps(executable, batch, arguments.seconds)
                    elapsed = time.perf_counter() - start
                share = spent[0] / elapsed
                slowdowns.append(beside / alone)
                shares.append(share)
                excesses.append(beside / alone / (num_cores / (num_cores - min(share, num_cores - 0.01))) - 1)
            estimates = {
                "slowdown": estimate_median(slowdowns),
                "neighbour_cores": estimate_median(shares),
                "excess": estimate_median(excesses),
            }
            results[f"{step} beside {neighbour}"] = {name: asdict(e) for name, e in estimates.items()}
            rows.append((f"{step} beside {neighbour}", describe(estimates)))
    publish(arguments, results, rows)


def describe(estimates: dict[str, Estimate]) -> str:
    excess, cores = estimates["excess"], estimates["neighbour_cores"]
    return (
        f"{estimates['slowdown']} times as long, the neighbour takes {cores.median:.2f} cores; "
        f"beyond that {excess.median:+.1%} [{excess.low:+.1%}, {excess.high:+.1%}]"
    )


def make_step(step: str, arguments: Any) -> tuple[Any, Batch]:
    """What runs it, and its batch."""
    is_encoder = step == ENCODER_STEP
    checkpoint = open_checkpoint(resolve(arguments.encoder if is_encoder else arguments.model))
    executable = compile_native(
        optimize(build_graph(read_config(checkpoint.config), checkpoint.tensors)),
        checkpoint.tensors,
        weights=arguments.weights,
        threads=arguments.threads,
        limits=ENCODER_LIMITS if is_encoder else DECODER_LIMITS,
    )
    if not is_encoder:
        return executable, make_batch(DECODER_STEPS[step], CONTEXT)
    ids = np.random.default_rng(0).integers(executable.vocab_size, size=(SENTENCES, SENTENCE_TOKENS)).tolist()
    blocks = np.arange(ENCODER_LIMITS.num_blocks).reshape(SENTENCES, -1).tolist()
    return executable, build_encoder_batch([EncoderInput(own) for own in ids], blocks)


def time_steps(executable: Any, batch: Batch, seconds: float) -> float:
    """The mean time of steps that run for so long."""
    executable.run(batch)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        executable.run(batch)
        count += 1
    return (time.perf_counter() - start) / count


@contextmanager
def busy(kind: type[Thread | Process]) -> Iterator[list[float]]:
    """A neighbour while the context lasts; then the seconds of CPU that it took."""
    spent: list[float] = []
    neighbour = kind()
    try:
        yield spent
    finally:
        spent.append(neighbour.stop())


if __name__ == "__main__":
    main()
