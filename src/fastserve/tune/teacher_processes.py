"""A teacher in several processes of this machine: each has its own, and computes its share of the parts of a
cache."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch

from fastserve.errors import StepError
from fastserve.evaluate.task.task import Features, Task
from fastserve.hub.resolve import resolve
from fastserve.tune.logit_cache import Parts, without_labels, write_part
from fastserve.tune.source_model import load_model, open_source_model

_SECONDS_TO_WAIT = 0.05  # for one process before the next is looked at


@dataclass(frozen=True, slots=True)
class TeacherProcesses:
    """Processes that have parts of a cache written.

    Attributes:
        num: how many; each computes with its share of this process's threads.
        spec: of the teacher.
        features: of all examples.
    """

    num: int
    spec: str
    task: Task
    features: Seq[Features]
    pad_token_id: int

    def __call__(self, parts: Parts, missing: Seq[int]) -> None:
        """As `Compute`. If a process fails, the others are ended; parts that are finished stay.

        Raises:
            StepError: a process failed; how many parts there are is told, and the end of what it wrote.
        """
        shares = [missing[rank :: self.num] for rank in range(min(self.num, len(missing)))]
        threads = max(torch.get_num_threads() // self.num, 1)
        with tempfile.TemporaryDirectory() as folder:
            started: list[tuple[subprocess.Popen[bytes], Path]] = []
            try:
                for rank, numbers in enumerate(shares):
                    request, errors = Path(folder) / f"request{rank}", Path(folder) / f"errors{rank}"
                    request.write_bytes(pickle.dumps(self._request(parts, numbers, threads)))
                    with errors.open("wb") as file:
                        started.append((start_process(request, file.fileno()), errors))
                self._wait(started, parts)
            finally:
                for process, _ in started:
                    process.kill()
                    process.wait()

    def _request(self, parts: Parts, numbers: Seq[int], threads: int) -> _Request:
        examples = {
            parts.path(number): without_labels(self.features[parts.examples(number)]) for number in numbers
        }
        return _Request(self.spec, self.task, examples, self.pad_token_id, threads)

    def _wait(self, started: Seq[tuple[subprocess.Popen[bytes], Path]], parts: Parts) -> None:
        pending = list(started)
        while pending:
            process, errors = pending.pop(0)
            try:
                process.wait(_SECONDS_TO_WAIT)
            except subprocess.TimeoutExpired:
                pending.append((process, errors))
                continue
            if process.returncode:
                told = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                code = process.returncode
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                num_done = len(parts) - len(parts.missing())
                raise StepError(
                    f"a process of the teacher {how}{f': {told[-1]}' if told else ''}; {num_done} of"
                    f" {len(parts)} parts of its outputs are computed and kept",
                    hint="resume the run, with fewer teacher_processes where memory was short",
                )


@dataclass(frozen=True, slots=True)
class _Request:
    spec: str
    task: Task
    examples: Mapping[Path, Seq[Features]]
    pad_token_id: int
    threads: int


def start_process(request: Path, errors: int) -> subprocess.Popen[bytes]:
    """A process that does what a request says, and writes errors to an open file. It ignores that this one
    is of several that train."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "fastserve.tune.teacher_processes", str(request)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=alone)


def _work(path: Path) -> None:
    """What each process runs; the request was written by the one that started it."""
    request: _Request = pickle.loads(path.read_bytes())
    torch.set_num_threads(request.threads)
    source = open_source_model(request.spec, resolve(request.spec))
    model = load_model(source, request.task, dropout=None).eval()
    for part, features in request.examples.items():
        write_part(model, features, part, request.pad_token_id)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
