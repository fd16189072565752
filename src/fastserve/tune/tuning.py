"""`tune`: a whole run, in this process or in several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.data.problem import Problem
from fastserve.tune.options import TuneOptions
from fastserve.tune.prepared_run import prepare
from fastserve.tune.run import Run, TuneResult, WorkerRequest
from fastserve.tune.weight_change import WeightChange

if TYPE_CHECKING:
    from fastserve.tune.trainer import Progress


def tune(
    task: str,
    *,
    model: str,
    train: str | Path,
    output: str | Path,
    dev: str | Path | None = None,
    options: TuneOptions | None = None,
    on_problem: Mapping[str, str] | None = None,
    change: WeightChange | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
    report_problem: Callable[[Problem], None] | None = None,
    on_evaluate: Callable[[int, dict[str, float]], None] | None = None,
) -> TuneResult:
    """Tune a pretrained model on labelled rows; `output` is a model directory afterwards.

    Args:
        task: one of `fastserve.evaluate.task.table.TASK_NAMES`.
        model: a name, a source, a folder or a .gguf file, as everywhere.
        train, dev: files of rows, in any form that `fastserve.data` reads.
        on_problem: what to do about a kind of problem in the rows, {"bad-label": "drop"}; see
            `fastserve.data.PROBLEM_KINDS`. A text that train and dev share is one, `split-overlap`.
        change: what the model computes with in place of its weights; None: with them.
        resume: go on with the unfinished run of this output, where there is one: its final weights are those
            of a run that never stopped, bit for bit on a CPU with as many threads.
        report: is told of each step.
        report_problem: is told each problem of the rows, before anything is trained.
        on_evaluate: is told step and metrics of each evaluation; what it raises ends the run.

    >>> tune("causal-lm", model="smollm2-135m-instruct", train="a.txt", output="b").path  # doctest: +SKIP
    PosixPath('b')

    Raises:
        OptionError: an option that does not fit, such as a metric that the task does not have.
        DataError: rows that are no rows of the task.
        UnsupportedError: a library of the extra is missing, or the model has no head for the task.
    """
    started = time.monotonic()
    prepared = prepare(
        task,
        model,
        train,
        dev,
        Path(output),
        options or TuneOptions(),
        on_problem or {},
        change=change,
        report_problem=report_problem,
    )
    checkpoint = prepared.folder.begin(prepared.request, resume=resume)
    if prepared.options.processes > 1:
        from fastserve.tune.processes import run_in_processes  # needs torch

        return run_in_processes(
            prepared.options.processes,
            WorkerRequest(
                task,
                model,
                str(train),
                None if dev is None else str(dev),
                str(output),
                prepared.options,
                on_problem,
                change,
            ),
            report=report,
            on_evaluate=on_evaluate,
        )
    return Run(prepared, report, on_evaluate).run(checkpoint, started)
