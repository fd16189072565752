"""How good a compressed model is beside its source, on text or labelled rows, natively."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.compress.model_kind import writes_text
from fastserve.data.load import load_data
from fastserve.data.read import read_rows
from fastserve.data.row import texts_of
from fastserve.errors import DataError, UnsupportedError
from fastserve.evaluate.bootstrap import Interval, bootstrap
from fastserve.evaluate.language_model import LanguageModel, compare_models, read_windows
from fastserve.evaluate.prediction import PredictorOptions
from fastserve.evaluate.task.table import task_of_folder
from fastserve.evaluate.task.task import LOWER_IS_BETTER
from fastserve.evaluate.task_evaluation import Evaluation, evaluate_folder
from fastserve.types import Int64Array, JsonObject

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Where nobody looks."""


WINDOWS = 16  # of text that a language model is judged by, unless told otherwise
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """A metric of the source and of the compressed model, and how much more the latter has: intervals are of
    a paired bootstrap."""

    before: Interval
    after: Interval
    difference: Interval

    def to_json(self) -> JsonObject:
        return {name: getattr(self, name).to_json() for name in ("before", "after", "difference")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """
    Attributes:
        judged_by: `16 windows of 512 tokens`, `200 rows`.
        metric: the main one, by which budgets are kept.
        metrics: by name.
        apart: how far predictions are from the source's: `mean_kl` in nats, `top1_agreement` and the like.
        change: of the main metric, as a share of what it was; below 0 is worse, whichever way it counts.
    """

    judged_by: str
    metric: str
    metrics: dict[str, Change] = field(default_factory=dict)
    apart: dict[str, Interval] = field(default_factory=dict)
    change: float = 0.0

    @property
    def values(self) -> dict[str, float]:
        """Of the compressed model's metrics."""
        return {name: change.after.value for name, change in self.metrics.items()}

    def to_json(self) -> JsonObject:
        return {
            "judged_by": self.judged_by,
            "metric": self.metric,
            "change": self.change,
            "metrics": {name: change.to_json() for name, change in self.metrics.items()},
            "apart": {name: interval.to_json() for name, interval in self.apart.items()},
        }


class Judge(Protocol):
    """Holds a source model, and compares others with it."""

    def judge(self, folder: Path, progress: Progress = silent) -> Quality:
        """Of a model directory. What it is served as computes. The source is run the first time."""

    def narrowed(self, limit: int) -> Judge:
        """A judge by the first so many windows, rows or texts alone; a large source is shared."""


def open_judge(
    source: Path,
    data: Path,
    *,
    limit: int | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> Judge:
    """What judges models made of `source`, whose own numbers are exact (float32): by perplexity where it
    writes text, by its task where it has one, else by its embeddings of texts. Only the data is read yet.

    Args:
        data: text, or rows of the model's task.
        limit: judge by so many windows or rows.

    Raises:
        DataError: the file has too little, or no rows of the task.
    """
    checkpoint = open_checkpoint(source)
    if writes_text(checkpoint):
        return _TextJudge(checkpoint, data, limit, threads, seed)
    try:
        task = task_of_folder(source).name
    except UnsupportedError:
        return _EmbeddingJudge(source, data, limit, threads, seed)
    return _TaskJudge(source, list(load_data(data, task))[:limit], data, threads, seed)


class _TextJudge:
    """By perplexity, KL and agreement, teacher-forced."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: Path,
        limit: int | None,
        threads: int | None,
        seed: int,
    ) -> None:
        texts = (f"{text}\n" for text in read_texts(data))
        self._windows = read_windows(checkpoint, texts, most=limit or WINDOWS)
        self._checkpoint, self._threads, self._seed = checkpoint, threads, seed

    def narrowed(self, limit: int) -> _TextJudge:
        judge = copy(self)
        judge.__dict__["_source"] = self._source
        judge._windows = self._windows[:limit]
        return judge

    @cached_property
    def _source(self) -> LanguageModel:
        return LanguageModel(self._checkpoint, weights="f32", kv_dtype="f32", threads=self._threads)

    def judge(self, folder: Path, progress: Progress = silent) -> Quality:
        total = len(self._windows)
        other = LanguageModel(folder, threads=self._threads)
        difference = compare_models(
            self._source,
            other,
            self._windows,
            progress=lambda done: progress("perplexity", done, total),
        )
        figures = difference.figures(resamples=RESAMPLES, seed=self._seed)
        change = Change(figures["perplexity"], figures["other_perplexity"], figures["perplexity_increase"])
        names = ("mean_kl", "top1_agreement", "top1_agreement_outside_ties")
        return Quality(
            judged_by=f"{total} windows of {len(self._windows[0])} tokens",
            metric="perplexity",
            metrics={"perplexity": change},
            apart={name: figures[name] for name in names},
            change=-figures["perplexity_increase"].value,
        )


class _TaskJudge:
    """By the metrics of a task on labelled rows."""

    def __init__(self, source: Path, rows: Seq[Any], data: Path, threads: int | None, seed: int) -> None:
        if not rows:
            raise DataError(f"{data} has no rows", hint="give a file with rows")
        self._folder, self._rows, self._threads, self._seed = source, rows, threads, seed

    def narrowed(self, limit: int) -> _TaskJudge:
        return _TaskJudge(self._folder, self._rows[:limit], self._folder, self._threads, self._seed)

    @cached_property
    def _source(self) -> Evaluation:
        options = PredictorOptions(weights="f32", threads=self._threads, truncate=True)
        return evaluate_folder(self._folder, self._rows, options)

    def judge(self, folder: Path, progress: Progress = silent) -> Quality:
        progress(self._source.task.name, 0, 1)
        other = evaluate_folder(folder, self._rows, PredictorOptions(threads=self._threads, truncate=True))
        metrics = self._changes(other)
        metric = next(name for name in self._source.task.metrics if name in metrics)
        before, difference = metrics[metric].before.value, metrics[metric].difference.value
        share = difference / abs(before) if before else difference
        return Quality(
            judged_by=f"{len(self._rows)} rows of {self._source.task.name}",
            metric=metric,
            metrics=metrics,
            apart=self._apart(other),
            change=-share if metric in LOWER_IS_BETTER else share,
        )

    def _changes(self, other: Evaluation) -> dict[str, Change]:
        task, rows = self._source.task, self._rows

        def measure(chosen: Int64Array) -> dict[str, float]:
            picked = [rows[index] for index in chosen]
            before, after = (
                task.score(picked, [one.predictions[index] for index in chosen]).metrics
                for one in (self._source, other)
            )
            return {
                f"{name}/{what}": value
                for name in before.keys() & after.keys()
                for what, value in (
                    ("before", before[name]),
                    ("after", after[name]),
                    ("difference", after[name] - before[name]),
                )
            }

        # Scoring takes milliseconds a resample where there are thousands of rows.
        resamples = max(min(RESAMPLES, 2_000_000 // max(len(rows), 1)), 100)
        found = bootstrap(measure, len(rows), resamples=resamples, seed=self._seed)
        names = sorted({name.partition("/")[0] for name in found})
        return {
            name: Change(*(found[f"{name}/{what}"] for what in ("before", "after", "difference")))
            for name in names
        }

    def _apart(self, other: Evaluation) -> dict[str, Interval]:
        """Agreement of labels, and KL of their probabilities, where the task has such."""
        pairs = list(zip(self._source.predictions, other.predictions, strict=True))
        values: dict[str, list[float]] = {}
        if all("label" in one and "label" in two for one, two in pairs):
            values["top1_agreement"] = [float(one["label"] == two["label"]) for one, two in pairs]
        if all(isinstance(one.get("probabilities"), dict) for pair in pairs for one in pair):
            is_one = getattr(self._source.task, "problem", "single-label") == "single-label"
            if is_one:
                values["mean_kl"] = [_kl(one["probabilities"], two["probabilities"]) for one, two in pairs]
        return _means(values, self._seed)


class _EmbeddingJudge:
    """By the cosine of embeddings with the source's, of any texts."""

    def __init__(self, source: Path, data: Path, limit: int | None, threads: int | None, seed: int) -> None:
        self._threads, self._seed = threads, seed
        self._texts = [text for text in read_texts(data) if text.strip()][: limit or 256]
        if len(self._texts) < 2:
            raise DataError(f"{data} has {len(self._texts)} texts; 2 are needed at least", hint="give more")
        self._folder = source

    def narrowed(self, limit: int) -> _EmbeddingJudge:
        judge = copy(self)
        judge._texts = self._texts[: max(limit, 2)]
        judge.__dict__["_source"] = self._source[: max(limit, 2)]
        return judge

    @cached_property
    def _source(self) -> Any:
        return self._embed(self._folder, "f32")

    def judge(self, folder: Path, progress: Progress = silent) -> Quality:
        progress("embeddings", 0, 1)
        other = self._embed(folder, "auto")
        cosines = (self._source * other).sum(axis=1)
        ours, theirs = (_nearest(vectors) for vectors in (self._source, other))
        values = {"cosine": cosines.tolist(), "same_neighbour": (ours == theirs).astype(float).tolist()}
        figures = _means(values, self._seed)
        whole = Interval(1.0, 1.0, 1.0, 1.0)
        cosine = figures.pop("cosine")
        less = Interval(cosine.value - 1, cosine.low - 1, cosine.high - 1, 0.0)
        return Quality(
            judged_by=f"embeddings of {len(self._texts)} texts",
            metric="cosine",
            metrics={"cosine": Change(whole, cosine, less)},
            apart=figures,
            change=cosine.value - 1,
        )

    def _embed(self, folder: Path, weights: Any) -> Any:
        """Unit vectors [texts, width]."""
        from fastserve.engine.pipeline import pipeline

        with pipeline("embedding", folder, weights=weights, threads=self._threads) as opened:
            rows = [{"text": text} for text in self._texts]
            vectors = np.array([found["embedding"] for found in opened.predict(rows, truncate=True)])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def read_texts(file: Path) -> Iterator[str]:
    """Every text of a file of text, or of rows of any task."""
    for row in read_rows(file):
        yield from texts_of(row)


def _nearest(vectors: Any) -> Any:
    """Of each text, the index of the text that is most like it."""
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    return similarity.argmax(axis=1)


def _kl(expected: dict[str, float], actual: dict[str, float]) -> float:
    """KL of probabilities by label, in nats."""
    return sum(
        p * float(np.log(p / max(actual.get(label, 0.0), 1e-12))) for label, p in expected.items() if p > 0
    )


def _means(values: dict[str, list[float]], seed: int) -> dict[str, Interval]:
    """Means over rows, with intervals."""
    if not values:
        return {}
    arrays = {name: np.asarray(numbers) for name, numbers in values.items()}
    count = len(next(iter(arrays.values())))
    return bootstrap(
        lambda rows: {name: float(numbers[rows].mean()) for name, numbers in arrays.items()},
        count,
        resamples=RESAMPLES,
        seed=seed,
    )
