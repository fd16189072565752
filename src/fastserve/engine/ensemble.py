"""The folder of an ensemble, opened: members within it that say the same labels, and how they become one."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from fastserve.checkpoint.file import read_json, read_optional_json
from fastserve.engine.mix import Mix
from fastserve.engine.probability import are_exclusive
from fastserve.errors import CheckpointError
from fastserve.models.ensemble import ENSEMBLE_TASKS, EnsembleSettings, read_ensemble
from fastserve.models.task import TaskSettings, read_task


@dataclass(frozen=True, slots=True)
class EnsembleFolder:
    """`settings` are those of the ensemble as a whole."""

    path: Path
    settings: TaskSettings
    ensemble: EnsembleSettings

    @property
    def members(self) -> list[Path]:
        """Their folders."""
        return [self.path / name for name in self.ensemble.members]

    def make_mix(self, members: Seq[TaskSettings]) -> Mix:
        """How what members of these settings say becomes one.

        Raises:
            CheckpointError: a member is for something else than the ensemble.
        """
        orders = []
        for name, member in zip(self.ensemble.members, members, strict=True):
            difference = difference_of(self.settings, member)
            if difference is not None:
                raise CheckpointError(f"member {name} of {self.path} {difference}")
            orders.append([member.labels.index(label) for label in self.settings.labels])
        return Mix(self.ensemble, orders, are_exclusive(self.settings))


def open_ensemble(path: Path) -> EnsembleFolder | None:
    """The ensemble in a folder; None where a path is something else.

    Raises:
        CheckpointError: what its files say of it is impossible.
    """
    if not path.is_dir():
        return None
    card = read_optional_json(path / "fastserve.json")
    if "ensemble" not in card:
        return None
    settings = read_task(read_json(path / "config.json"), card, is_decoder=False)
    if settings.task not in ENSEMBLE_TASKS:
        raise CheckpointError(
            f"{path} is an ensemble for {settings.task}",
            hint=f"ensembles are for {', '.join(ENSEMBLE_TASKS)}",
        )
    ensemble = read_ensemble(card, num_labels=len(settings.labels))
    assert ensemble is not None
    return EnsembleFolder(path, settings, ensemble)


def difference_of(one: TaskSettings, other: TaskSettings) -> str | None:
    """What keeps two models out of one ensemble, as the second one's: None where nothing does. The order of
    labels may differ."""
    if other.task != one.task and (other.is_declared or not other.can(one.task)):
        return f"is for {other.task}, not for {one.task}"
    if other.problem_type != one.problem_type:
        return f"is for {other.problem_type}, not for {one.problem_type}"
    lacking = [label for label in one.labels if label not in other.labels]
    if lacking:
        return f"lacks the label {lacking[0]!r}"
    added = [label for label in other.labels if label not in one.labels]
    if added:
        return f"has the label {added[0]!r}, which is none of {', '.join(one.labels)}"
    return None
