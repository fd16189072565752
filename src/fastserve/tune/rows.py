"""The rows of a run: read, checked one by one and across their splits, and the task that they pose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from fastserve.data.leak import drop_overlaps, drop_unseen_labels
from fastserve.data.load import load_data
from fastserve.data.problem import Problem, ProblemLog
from fastserve.data.row import Row
from fastserve.errors import DataError
from fastserve.evaluate.task.table import TaskOptions, make_task
from fastserve.evaluate.task.task import Task
from fastserve.evaluate.task.text_classification import TextClassification


@dataclass(frozen=True, slots=True)
class RunRows:
    """What a run learns and what it is judged by.

    Attributes:
        task: that the training rows pose.
        dev: None where there are none.
        problems: all that were found and not fatal, each with what was done about it.
    """

    task: Task
    train: Seq[Row]
    dev: Seq[Row] | None
    problems: Seq[Problem]

    @property
    def problem_counts(self) -> dict[str, int]:
        """By kind and what was done about it, how many."""
        counts = Counter(f"{problem.kind} ({problem.action})" for problem in self.problems)
        return dict(sorted(counts.items()))


def read_run_rows(
    task: str,
    train: str | Path,
    dev: str | Path | None,
    options: TaskOptions,
    *,
    on_problem: Mapping[str, str],
    report_problem: Callable[[Problem], None] | None = None,
) -> RunRows:
    """Read the files of a run. A text that both have is a problem `split-overlap`, a label that dev alone has
    `unseen-label`.

    Args:
        on_problem: as of `fastserve.tune.tune`.
        report_problem: is told each problem as it is met.

    Raises:
        DataError: problems that are fatal, several at once; or no row is left.
    """
    problems: list[Problem] = []

    def note(problem: Problem) -> None:
        problems.append(problem)
        if report_problem is not None:
            report_problem(problem)

    log = ProblemLog(on_problem, sink=note, raises_at_once=False)
    splits = {"train": _read(train, task, log)}
    if dev is not None:
        splits["dev"] = _read(dev, task, log)
    splits = drop_overlaps(splits, log)
    log.raise_fatal()
    if not splits["train"]:
        raise DataError(f"all rows of {train} are in {dev} too", hint="give other rows to train on")
    made = make_task(task, splits["train"], options)
    if _has_classes(made):
        splits = drop_unseen_labels(splits, log)
        log.raise_fatal()
        if dev is not None and not splits["dev"]:
            raise DataError(f"no row of {dev} has a label of {train}", hint="give rows of the same labels")
    return RunRows(made, splits["train"], splits.get("dev"), problems)


def _read(path: str | Path, task: str, log: ProblemLog) -> list[Row]:
    rows = load_data(path, task, log=log)
    log.raise_fatal()
    if not rows:
        raise DataError(f"{path} has no rows", hint="give a file with rows")
    return rows


def _has_classes(task: Task) -> bool:
    is_regression = isinstance(task, TextClassification) and task.problem == "regression"
    return bool(task.labels) and not is_regression
