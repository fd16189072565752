"""A model directory on labelled rows: scores, how fast it is, and how it compares with another on the same
rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.engine.energy import POWERCAP, EnergyReading, find_counters
from fastserve.errors import DataError, OptionError
from fastserve.evaluate.bootstrap import Interval, bootstrap
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.predictor import open_predictor
from fastserve.evaluate.probe import ProbeReport, probe
from fastserve.evaluate.task.embedding import Embedding
from fastserve.evaluate.task.table import task_of_folder
from fastserve.evaluate.task.task import LOWER_IS_BETTER, Prediction, Row, Scores, Task

_TIMED_ROWS = 30  # that are predicted one by one, for latency


@dataclass(frozen=True, slots=True)
class Speed:
    """Of predictions: rows a second of all at once, and the time of one row alone, median and 95th
    percentile."""

    rows_per_second: float
    latency_ms_median: float
    latency_ms_p95: float


@dataclass(frozen=True, slots=True)
class Energy:
    """What the machine consumed while all rows were predicted at once: all of it, in joules, by row and by
    token that was read or written."""

    joules: float
    joules_per_row: float
    joules_per_token: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model directory does on rows.

    Attributes:
        backend: what computed, `native` or `torch`.
        predictions: one for each row.
        num_tokens: that were read and written for them.
        energy: None where the machine does not tell.
        probes: what probes for bias found, where they were asked for.
    """

    folder: Path
    task: Task
    backend: str
    num_rows: int
    scores: Scores
    speed: Speed
    predictions: Seq[Prediction]
    num_tokens: int
    energy: Energy | None
    probes: ProbeReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Metrics by name, figures by label, the confusion matrix, reliability and speed."""
        scores = self.scores
        document: dict[str, Any] = {
            "model": str(self.folder),
            "task": self.task.name,
            "backend": self.backend,
            "num_rows": self.num_rows,
            "num_tokens": self.num_tokens,
            "metrics": scores.metrics,
            "speed": asdict(self.speed),
            "energy": None if self.energy is None else asdict(self.energy),
        }
        if scores.by_label:
            document["by_label"] = {label: figures.to_json() for label, figures in scores.by_label.items()}
        if scores.confusion is not None:
            document["confusion"] = {"labels": list(scores.labels), "counts": scores.confusion.tolist()}
        if self.probes is not None:
            document["probes"] = self.probes.to_json()
        if scores.bins:
            document["reliability"] = [asdict(bin_) for bin_ in scores.bins]
        return document


def evaluate_folder(
    folder: Path,
    rows: Seq[Row],
    options: PredictorOptions | None = None,
    *,
    probes: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
    powercap: Path = POWERCAP,
) -> Evaluation:
    """Predict rows with a model directory, and score the predictions; run `probes` (`read_probes`) on it.

    Args:
        powercap: where the machine tells what it consumes.

    Raises:
        UnsupportedError: nothing can run the model.
        DataError: there are no rows, or one that the task cannot take.
        ContextLengthError: a row is too long, and may not be cut.
    """
    options = options or PredictorOptions()
    task = task_of_folder(folder)
    if not rows:
        raise DataError("there are no rows to evaluate on", hint="give some")
    if probes is not None and task.name != "text-classification":
        raise OptionError(
            f"probes are for text-classification, {folder} is for {task.name}", hint="leave them out"
        )
    if isinstance(task, Embedding) and "label" in rows[0]:
        task = replace(task, has_labels=True)
    predictor = open_predictor(folder, task, options, note=note)
    try:
        with EnergyReading(find_counters(powercap)) as reading:
            started = time.perf_counter()
            predictions = predictor.predict(rows)
            seconds = time.perf_counter() - started
        num_tokens = predictor.num_tokens
        found = None
        if probes is not None:
            found = probe(lambda texts: predictor.predict([{"text": text} for text in texts]), probes)
        times = [_time(partial(predictor.predict, [row])) for row in rows[:_TIMED_ROWS]]
    finally:
        predictor.close()
    latencies = sorted(1000 * value for value in times)
    speed = Speed(
        len(rows) / seconds, statistics.median(latencies), latencies[int(0.95 * (len(latencies) - 1))]
    )
    scores = task.score(rows, predictions)
    return Evaluation(
        folder,
        task,
        predictor.backend,
        len(rows),
        scores,
        speed,
        predictions,
        num_tokens,
        None if reading.joules is None else _share(reading.joules, len(rows), num_tokens),
        found,
    )


def _share(joules: float, num_rows: int, num_tokens: int) -> Energy:
    return Energy(joules, joules / num_rows, joules / max(num_tokens, 1))


def compare(
    first: Evaluation, second: Evaluation, rows: Seq[Row], *, resamples: int, seed: int
) -> dict[str, Interval]:
    """Of each metric that both have, how much more the first one has, with its interval: rows are resampled
    for both alike. `share_above` is how often the first is better (of metrics of which less is better: has
    less).

    Raises:
        OptionError: they are of different tasks.
    """
    if first.task.name != second.task.name:
        raise OptionError(
            f"compare: {second.folder} is for {second.task.name}, {first.folder} for {first.task.name}",
            hint="compare models of one task",
            option="compare",
        )

    def measure(chosen: NDArray[np.int64]) -> dict[str, float]:
        picked = [rows[index] for index in chosen]
        of_first, of_second = (
            one.task.score(picked, [one.predictions[index] for index in chosen]).metrics
            for one in (first, second)
        )
        gains = {name: of_first[name] - of_second[name] for name in of_first if name in of_second}
        return {name: -gain if name in LOWER_IS_BETTER else gain for name, gain in gains.items()}

    found = bootstrap(measure, len(rows), resamples=resamples, seed=seed)
    return {
        name: Interval(0.0 - gain.value, 0.0 - gain.high, 0.0 - gain.low, gain.share_above)
        if name in LOWER_IS_BETTER
        else gain
        for name, gain in found.items()
    }


def _time(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
