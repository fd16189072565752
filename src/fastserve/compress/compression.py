"""`compress`: a whole run, from a model and a recipe to an artifact with its report."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from fastserve.compress.compress_run import (
    CompressData,
    CompressResult,
    Progress,
    finished_report,
    prepare,
)
from fastserve.compress.precondition import check_libraries


def compress(
    model: str | Path,
    *,
    recipe: str | Path,
    output: str | Path,
    data: CompressData | None = None,
    budget: str | None = None,
    archive: bool = False,
    accept: bool = False,
    resume: bool = False,
    limit: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> CompressResult:
    """Compress a model by a recipe; `output` is a model directory afterwards, with a report in it.

    What is written is read again and held to what was meant, number by number, and its answers to probes to
    those of the model in memory. The source is not changed.

    Args:
        model: a name, a source, a folder or a .gguf file, as everywhere.
        recipe: the name of one that ships, or a file.
        budget: such as "size<=60MB quality>=-1% decode<=8ms"; see `fastserve.compress.budget`. An artifact
            that does not keep it is refused: it stays in `OUTPUT.run`, from which `resume` with `accept`
            takes it.
        archive: `output` is the artifact's archive: smaller, and expanded where it is opened.
        accept: have the artifact whatever the budget says.
        resume: go on with the unfinished run of this output.
        limit: judge by so many rows, or windows of text.
        progress: is told what is being done, how many are done, and of how many.

    >>> compress("all-minilm-l6-v2", recipe="int8", output="out").path  # doctest: +SKIP
    PosixPath('out')

    Raises:
        OptionError: an option, a recipe or a budget that does not fit.
        DataError: too little calibration text, or rows that are none of the task.
        CheckpointError: weights that are not finite; or the artifact is not what was meant.
        UnsupportedError: a library of the extra is missing, or the model is none that we have.
    """
    started = time.monotonic()
    check_libraries()
    run = prepare(model, [recipe], output, data, budget, limit=limit, seed=seed, threads=threads)
    (chosen,) = run.recipes
    run.folder.begin(run.request, resume=resume)
    artifact = run.folder.path / "artifact"
    report = finished_report(artifact)
    if report is None:
        shutil.rmtree(artifact, ignore_errors=True)
        report = run.make(chosen, artifact, progress, started=started)
    return run.conclude(artifact, report, accept=accept, archive=archive)
