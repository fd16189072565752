"""What the members of an ensemble say of labelled rows: run once, mixed as often as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastserve.config import EngineOptions
from fastserve.data.load import load_data
from fastserve.data.problem import Problem, ProblemLog
from fastserve.data.row import Row
from fastserve.engine.ensemble import EnsembleFolder, open_ensemble
from fastserve.engine.load import load_model
from fastserve.engine.loaded_model import Ensemble, LoadedModel, make_encoder
from fastserve.engine.task.prepared import Prepared, finish_all, inputs_of
from fastserve.engine.task.row import prepare_row
from fastserve.errors import ContextLengthError, DataError
from fastserve.evaluate.task.table import task_of_folder
from fastserve.evaluate.task.task import Prediction, Task, place_of
from fastserve.evaluate.task.token_classification import tagged_tokens
from fastserve.models.ensemble import EnsembleSettings
from fastserve.types import Float32Array, Float64Array

Mixing = Callable[[Seq[Float64Array]], Float64Array]


class _Switch:
    """A mix that is exchanged between two looks at the same logits."""

    def __init__(self, mix: Mixing) -> None:
        self.mix = mix

    def __call__(self, members: Seq[Float64Array]) -> Float64Array:
        return self.mix(members)


@dataclass(frozen=True, slots=True)
class MemberShares:
    """What the members of an ensemble say of rows.

    Attributes:
        probabilities: float64 [members, examples, labels], in the ensemble's order of labels; an example is a
            row, or a word where each has a tag.
        targets: float64 [examples, labels]: 1 where a label is right.
    """

    probabilities: Float64Array
    targets: Float64Array
    _folder: EnsembleFolder
    _model: LoadedModel
    _task: Task
    _rows: Seq[Row]
    _prepared: Seq[Prepared[Prediction]]
    _logits: Seq[Float32Array]
    _switch: _Switch

    def metrics(self, ensemble: EnsembleSettings) -> dict[str, float]:
        """Of the rows, by members that are mixed like that."""
        folder = replace(self._folder, ensemble=ensemble)
        return self._score(folder.make_mix([member.settings for member in self._model.members]))

    def member_metrics(self) -> tuple[dict[str, float], ...]:
        """Of the rows, by each member alone."""
        num_members = len(self._model.members)
        alone = (tuple(float(own == index) for own in range(num_members)) for index in range(num_members))
        return tuple(self.metrics(replace(self._folder.ensemble, weights=weights)) for weights in alone)

    def _score(self, mix: Mixing) -> dict[str, float]:
        self._switch.mix = mix
        return self._task.score(self._rows, finish_all(self._prepared, self._logits)).metrics


@contextmanager
def read_shares(
    path: Path,
    data: str | Path,
    *,
    truncate: bool,
    on_problem: Mapping[str, str],
    report_problem: Callable[[Problem], None] | None,
) -> Iterator[MemberShares]:
    """Run the members of an ensemble, whose method is average, on rows. They are in memory as long as the
    context lasts.

    Raises:
        DataError: there are no rows, one is none of the task, or its label is none of the ensemble's.
        ContextLengthError: a row is too long for a member, and may not be cut.
    """
    folder = open_ensemble(path)
    assert folder is not None
    rows = _read(folder, data, on_problem, report_problem)
    loaded = load_model(path, EngineOptions(weights="f32"))
    assert loaded.ensemble is not None
    mix = folder.make_mix([member.settings for member in loaded.members])
    switch = _Switch(mix)
    model = replace(loaded, ensemble=Ensemble(loaded.members, switch))
    prepared = [_prepare(model, row, truncate=truncate) for row in rows]
    logits = make_encoder(model).run_all(inputs_of(prepared))
    said: list[Float64Array] = []

    def record(members: Seq[Float64Array]) -> Float64Array:
        shares = mix.arrange(members)
        said.append(shares.reshape(len(shares), -1, shares.shape[-1]))
        return mix(members)

    switch.mix = record
    finish_all(prepared, logits)
    targets = [_targets(folder, row) for row in rows]
    yield MemberShares(
        np.concatenate(said, axis=1),
        np.concatenate(targets),
        folder,
        model,
        task_of_folder(path),
        rows,
        prepared,
        logits,
        switch,
    )


def _read(
    folder: EnsembleFolder,
    data: str | Path,
    on_problem: Mapping[str, str],
    report_problem: Callable[[Problem], None] | None,
) -> list[Row]:
    log = ProblemLog(on_problem, sink=report_problem, raises_at_once=False)
    settings = folder.settings
    rows = load_data(data, settings.task, tag_scheme=settings.tag_scheme or "iob2", log=log)
    log.raise_fatal()
    if not rows:
        raise DataError(f"{data} has no rows", hint="give a file with rows")
    return rows


def _prepare(model: LoadedModel, row: Row, *, truncate: bool) -> Prepared[Prediction]:
    try:
        return prepare_row(model, model.task, row, truncate=truncate)
    except ContextLengthError as error:
        hint = "split the text, or cut it with --truncate"
        raise ContextLengthError(f"{row.place}: {error.message}", hint=hint) from error


def _targets(folder: EnsembleFolder, row: Row) -> Float64Array:
    """Which labels are right [examples, labels]; of regression there are none."""
    labels = folder.settings.labels
    if folder.settings.problem_type == "regression":
        return np.zeros((0, len(labels)))
    if folder.settings.task == "token-classification":
        right = [[tag] for tag in tagged_tokens(row)[1]]
    else:
        right = [[str(label) for label in row.get("labels", [row.get("label")])]]
    targets = np.zeros((len(right), len(labels)))
    for index, own in enumerate(right):
        for label in own:
            if label not in labels:
                raise DataError(
                    f"{place_of(row)}: label {label!r} is none that the members know",
                    hint=f"labels are {', '.join(labels[:10])}" + (", ..." if len(labels) > 10 else ""),
                )
            targets[index, labels.index(label)] = 1
    return targets
