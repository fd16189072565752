"""Data-parallel training in several processes of this machine, started by torch's own launcher; they talk by
gloo on CPUs, by NCCL on GPUs."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastserve.errors import FastServeError, StepError
from fastserve.tune.run import TuneResult, WorkerRequest, tune_as_worker
from fastserve.tune.trainer import Progress

_MARK = "fastserve:"  # before what the first process tells the one that started it


def run_in_processes(
    num_processes: int,
    request: WorkerRequest,
    *,
    report: Callable[[Progress], None] | None,
    on_evaluate: Callable[[int, dict[str, float]], None] | None,
) -> TuneResult:
    """Run a request that has been begun in several processes, which share each batch.

    Each has one thread, unless OMP_NUM_THREADS says otherwise. What `on_evaluate` raises ends all of them.

    Raises:
        StepError: a process failed; the end of what it wrote is told.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request"
        path.write_bytes(pickle.dumps(request))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={num_processes}", "-m", "fastserve.tune.processes", str(path)]
        with (
            (Path(folder) / "errors").open("w+", encoding="utf-8") as errors,
            subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            assert process.stdout is not None
            result = None
            try:
                for line in process.stdout:
                    if line.startswith(_MARK):
                        result = _hear(json.loads(line.removeprefix(_MARK)), report, on_evaluate) or result
            except BaseException:
                process.terminate()
                raise
            process.wait()
            if process.returncode or result is None:
                errors.seek(0)
                told = [text for text in errors.read().splitlines() if "Error" in text]
                raise StepError(
                    f"a process of the training failed: {told[0] if told else process.returncode}"
                )
    return result


def _hear(
    message: dict[str, Any],
    report: Callable[[Progress], None] | None,
    on_evaluate: Callable[[int, dict[str, float]], None] | None,
) -> TuneResult | None:
    """Hand on what `_tell` wrote; the result, where it is that."""
    content = message["content"]
    if message["kind"] == "progress" and report is not None:
        report(Progress(**content))
    elif message["kind"] == "evaluation" and on_evaluate is not None:
        on_evaluate(content["step"], content["metrics"])
    elif message["kind"] == "result":
        return TuneResult(**{**content, "path": Path(content["path"])})
    return None


def _tell(kind: str, content: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(_MARK + json.dumps({"kind": kind, "content": content}), flush=True)


def _work(path: Path) -> None:
    """What each process runs; the request was written by the one that started it."""
    request: WorkerRequest = pickle.loads(path.read_bytes())

    def report(progress: Progress) -> None:
        _tell("progress", {name: getattr(progress, name) for name in ("step", "num_steps", "figures")})

    def on_evaluate(step: int, metrics: dict[str, float]) -> None:
        _tell("evaluation", {"step": step, "metrics": metrics})

    try:
        _tell("result", tune_as_worker(request, report=report, on_evaluate=on_evaluate).to_json())
    except FastServeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
