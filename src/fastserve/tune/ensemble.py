"""Ensembles: several models of one task as one model directory, which is served like any other."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.data.problem import Problem
from fastserve.engine.ensemble import difference_of, open_ensemble
from fastserve.engine.load import read_settings
from fastserve.engine.mix import features_of
from fastserve.engine.probability import are_exclusive
from fastserve.errors import OptionError, UnsupportedError
from fastserve.evaluate.task.table import SETTINGS_FILE
from fastserve.hub.resolve import resolve
from fastserve.models.ensemble import ENSEMBLE_TASKS, EnsembleMethod, EnsembleSettings
from fastserve.models.task import TaskSettings
from fastserve.option import check_choice, check_number
from fastserve.tune.artifact import SCHEMA_VERSION, sync_folder
from fastserve.tune.digest import digest_files
from fastserve.tune.ensemble_rows import MemberShares, read_shares
from fastserve.tune.logistic_regression import fit_logistic_regression
from fastserve.types import JsonObject


@dataclass(frozen=True, slots=True)
class EnsembleResult:
    """What `make_ensemble` has made.

    Attributes:
        path: the model directory.
        members: the members' names, as they were given.
        metrics: of the dev rows, by the ensemble; empty without rows.
        member_metrics: of the same rows, by each member alone.
    """

    path: Path
    settings: EnsembleSettings
    members: tuple[str, ...]
    metrics: dict[str, float]
    member_metrics: tuple[dict[str, float], ...]

    def to_json(self) -> JsonObject:
        rows = self.member_metrics or ({},) * len(self.members)
        return {
            "path": str(self.path),
            "method": self.settings.method,
            "weights": list(self.settings.weights) or None,
            "metrics": self.metrics,
            "members": [
                {"model": name, "metrics": metrics} for name, metrics in zip(self.members, rows, strict=True)
            ],
        }


def make_ensemble(
    members: Seq[str | Path],
    output: str | Path,
    *,
    method: EnsembleMethod = "average",
    weights: Seq[float] | None = None,
    data: str | Path | None = None,
    penalty: float = 1.0,
    truncate: bool = False,
    on_problem: Mapping[str, str] | None = None,
    report_problem: Callable[[Problem], None] | None = None,
) -> EnsembleResult:
    """Make several models that predict the same labels into one model directory.

    The members are within it: their weights as hard links where the file system can, else as copies.

    >>> make_ensemble(["a", "b", "c"], "abc", data="dev.jsonl").metrics["accuracy"]  # doctest: +SKIP
    0.98

    Args:
        members: two or more, by name or folder; each of one task, with the same labels in any order.
        method: `average` of their probabilities (or numbers), `vote` of their likeliest labels, or
            `stacking`: a logistic regression on their probabilities, fitted on `data`.
        weights: of average and vote, one for each; None is equal.
        data: rows that no member was trained on: stacking learns from them; metrics of them are told.
        penalty: of stacking: see `fit_logistic_regression`.
        truncate: cut rows that are too long for a member, instead of refusing them.
        on_problem, report_problem: as of `fastserve.tune.tune`, of the rows.

    Raises:
        OptionError: there are fewer than two members, or an option does not fit the method.
        UnsupportedError: a member's task is none of ENSEMBLE_TASKS, differs from that of the first, or its
            labels do; it is named.
        DataError: a row is none of the task, or has a label that the members do not know.
    """
    output = Path(output)
    _check_options(members, method, weights, data, penalty)
    if output.exists():
        raise OptionError(f"output: {output} is there already", hint="name another folder", option="output")
    folders = [_folder_of(str(member)) for member in members]
    settings = _shared_settings(members, folders, method)
    written = output.with_name(f"{output.name}.part")
    shutil.rmtree(written, ignore_errors=True)
    names = tuple(f"{number}-{folder.name}" for number, folder in enumerate(folders, start=1))
    even = EnsembleSettings(method="average", members=names, weights=tuple(weights or (1.0,) * len(names)))
    try:
        for name, folder in zip(names, folders, strict=True):
            _take_member(folder, written / name)
        card = _card(settings, members, folders, data)
        _write_settings(written, settings, even, card)
        given = tuple(map(str, members))
        if data is None:
            result = EnsembleResult(output, replace(even, method=method), given, {}, ())
        else:
            with read_shares(
                written, data, truncate=truncate, on_problem=on_problem or {}, report_problem=report_problem
            ) as shares:
                chosen = (
                    _stacked(names, shares, settings, penalty)
                    if method == "stacking"
                    else replace(even, method=method)
                )
                result = EnsembleResult(
                    output, chosen, given, shares.metrics(chosen), shares.member_metrics()
                )
        _write_settings(written, settings, result.settings, {**card, "metrics": result.metrics})
        (written / "README.md").write_text(_readme(settings, result), encoding="utf-8")
        sync_folder(written)
        os.replace(written, output)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return result


def _check_options(
    members: Seq[str | Path],
    method: EnsembleMethod,
    weights: Seq[float] | None,
    data: str | Path | None,
    penalty: float,
) -> None:
    check_choice("method", method, get_args(EnsembleMethod))
    check_number("penalty", penalty, 0.0, 1e9, is_low_open=True)
    if len(members) < 2:
        raise OptionError(f"an ensemble has two members or more, not {len(members)}", option="members")
    if method == "stacking" and data is None:
        raise OptionError("stacking learns from rows", hint="give them with --data", option="data")
    if weights is None:
        return
    if method == "stacking":
        raise OptionError("stacking finds its own weights", hint="leave weights out", option="weights")
    if len(weights) != len(members):
        raise OptionError(
            f"there are {len(weights)} weights for {len(members)} members",
            hint="give one for each",
            option="weights",
        )
    for weight in weights:
        check_number("weights", weight, 0.0, 1e9)
    if not math.fsum(weights):
        raise OptionError("all weights are 0", hint="give a member some", option="weights")


def _folder_of(member: str) -> Path:
    path = resolve(member).resolve()
    if path.is_file():
        raise UnsupportedError(
            f"member {member} is a .gguf file, which has no head for a task",
            hint="give model directories, as `fastserve tune` makes them",
        )
    if open_ensemble(path) is not None:
        raise UnsupportedError(f"member {member} is an ensemble itself", hint="give its members instead")
    return path


def _shared_settings(members: Seq[str | Path], folders: Seq[Path], method: EnsembleMethod) -> TaskSettings:
    """What all members are for; the first that says its task says it for those that leave it open."""
    found = [read_settings(folder) for folder in folders]
    for member, settings in zip(members, found, strict=True):
        if settings.task not in ENSEMBLE_TASKS:
            raise UnsupportedError(
                f"member {member} is for {settings.task}, of which there are no ensembles",
                hint=f"ensembles are for {', '.join(ENSEMBLE_TASKS)}",
            )
    task = next((settings.task for settings in found if settings.is_declared), found[0].task)
    shared = replace(found[0], task=task)
    for member, settings in zip(members, found, strict=True):
        difference = difference_of(shared, settings)
        if difference is not None:
            raise UnsupportedError(f"member {member} {difference}", hint=f"the others are as {members[0]} is")
    if shared.problem_type == "regression" and method != "average":
        raise UnsupportedError(
            f"{method} is for labels; the members give numbers", hint="choose --method average"
        )
    lengths = [settings.max_length for settings in found if settings.max_length is not None]
    schemes = [settings.tag_scheme for settings in found if settings.tag_scheme is not None]
    return replace(shared, max_length=min(lengths, default=None), tag_scheme=next(iter(schemes), None))


def _take_member(folder: Path, target: Path) -> None:
    """What is needed to run a model; not its curves and adapters."""
    target.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            try:
                os.link(path, target / path.name)
                continue
            except OSError:  # another file system, or one without links
                pass
        shutil.copyfile(path, target / path.name)


def _stacked(
    names: tuple[str, ...], shares: MemberShares, settings: TaskSettings, penalty: float
) -> EnsembleSettings:
    found = fit_logistic_regression(
        features_of(shares.probabilities),
        shares.targets,
        is_exclusive=are_exclusive(settings),
        penalty=penalty,
    )
    return EnsembleSettings(
        method="stacking",
        members=names,
        coefficients=tuple(map(tuple, found.coefficients.tolist())),
        intercepts=tuple(found.intercepts.tolist()),
    )


def _card(
    settings: TaskSettings, members: Seq[str | Path], folders: Seq[Path], data: str | Path | None
) -> JsonObject:
    parents = [
        {"model": str(member), "weights_sha256": digest_files(open_checkpoint(folder).files)}
        for member, folder in zip(members, folders, strict=True)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "task": settings.task,
        "tag_scheme": settings.tag_scheme,
        **({} if settings.max_length is None else {"max_length": settings.max_length}),
        "lineage": {"members": parents, **({} if data is None else {"data": digest_files([data])})},
    }


def _write_settings(
    folder: Path, settings: TaskSettings, ensemble: EnsembleSettings, card: JsonObject
) -> None:
    per_token = settings.head is not None and settings.head.is_per_token
    config: dict[str, Any] = {
        "model_type": "ensemble",
        "architectures": [f"EnsembleFor{'Token' if per_token else 'Sequence'}Classification"],
        "id2label": dict(enumerate(settings.labels)),
        "label2id": {label: index for index, label in enumerate(settings.labels)},
        "problem_type": settings.problem_type,
    }
    for name, document in (
        ("config.json", config),
        (SETTINGS_FILE, {**card, "ensemble": ensemble.to_json()}),
    ):
        text = json.dumps(document, ensure_ascii=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _readme(settings: TaskSettings, result: EnsembleResult) -> str:
    lines = [
        f"# {settings.task}",
        "",
        f"An ensemble by {result.settings.method}, made by `fastserve ensemble`.",
        "",
    ]
    names = sorted(result.metrics)
    lines += [f"| model | {' | '.join(['weight', *names])} |", "|" + " --- |" * (2 + len(names))]
    weights = [f"{weight:g}" for weight in result.settings.weights] or ["stacked"] * len(result.members)
    metrics = result.member_metrics or ({},) * len(result.members)
    for member, weight, own in zip(result.members, weights, metrics, strict=True):
        lines.append(f"| {member} | {' | '.join([weight, *(f'{own[name]:.4f}' for name in names)])} |")
    if names:
        lines.append(f"| all | {' | '.join(['', *(f'{result.metrics[name]:.4f}' for name in names)])} |")
    return "\n".join([*lines, ""])
