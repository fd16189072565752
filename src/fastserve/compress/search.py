"""Searches a recipe for each layer group under a budget, measuring size, quality and speed on this machine.

1. Each recipe is followed whole: an artifact, measured.
2. Each layer group of the source is exchanged for that of each such artifact, alone: what it loses.
3. Choices of a recipe a group that promise to be best at a size, by the sums of what groups lose, are
   written and measured like any artifact.

The artifact that keeps the budget with the best quality wins; where none does, the one that misses it least.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.compress.artifact import settle, write_artifact
from fastserve.compress.budget import Budget
from fastserve.compress.compress_run import (
    CompressData,
    CompressResult,
    CompressRun,
    Progress,
    finished_report,
    prepare,
)
from fastserve.compress.group import can_exchange, find_groups, mix
from fastserve.compress.model_kind import writes_text
from fastserve.compress.pareto import Choice, front, front_of_sums
from fastserve.compress.precondition import check_libraries
from fastserve.compress.quality import Quality, silent
from fastserve.compress.recipe import Recipe
from fastserve.compress.report import REPORT_FOLDER, measured_values, with_budget
from fastserve.compress.step import Context, LayerError, WorkingModel
from fastserve.errors import OptionError
from fastserve.evaluate.pareto_plot import Point, plot_front
from fastserve.types import JsonObject

TRIALS = 6  # mixtures that are measured whole, unless told otherwise
_WINDOWS, _ROWS = 2, 200  # that a group's loss is measured on
_SOURCE = "as it is"


def default_recipes(*, has_calibration: bool) -> tuple[str, ...]:
    """What is searched where no recipe is named."""
    if has_calibration:
        return ("int8-all", "int4-gptq", "sparse50-int4")
    return ("int8-all", "int4-rtn")


def compress_to_budget(
    model: str | Path,
    *,
    output: str | Path,
    budget: str,
    data: CompressData,
    recipes: Sequence[str | Path] = (),
    trials: int = TRIALS,
    archive: bool = False,
    accept: bool = False,
    resume: bool = False,
    limit: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
) -> CompressResult:
    """Compress a model under a budget by the best that was found among recipes and mixtures of them.

    Args:
        recipes: names or files; none: see `default_recipes`.
        trials: mixtures that are measured.

    Other arguments, results and errors as of `fastserve.compress.compress`. The report has all that was
    measured as `search`, and a plot of it lies beside it.

    >>> data = CompressData(judged=Path("text.txt"))
    >>> compress_to_budget("all-minilm-l6-v2", output="out", budget="size<=25MB", data=data)  # doctest: +SKIP
    """
    check_libraries()
    if data.judged is None:
        raise OptionError(
            "a search measures quality on text or labelled rows",
            hint="give such a file with --data",
            option="data",
        )
    named = list(recipes) or list(default_recipes(has_calibration=data.calibration is not None))
    stems = [Path(name).stem for name in named]
    if len(set(stems)) < len(stems):
        raise OptionError(
            f"recipe: two are called {next(s for s in stems if stems.count(s) > 1)}",
            hint="name each once",
            option="recipe",
        )
    run = prepare(model, named, output, data, budget, limit=limit, seed=seed, threads=threads)
    run.folder.begin(run.request, resume=resume)
    return _Search(run, trials, progress).run(accept=accept, archive=archive)


@dataclass(frozen=True, slots=True)
class _Trial:
    """An artifact that was measured. `is_whole`: by one recipe for all groups."""

    name: str
    artifact: Path
    report: JsonObject
    is_whole: bool


class _Search:
    def __init__(self, run: CompressRun, trials: int, progress: Progress) -> None:
        assert run.budget is not None
        self._run, self._num_trials, self._progress = run, trials, progress
        self._budget: Budget = run.budget
        self._folder = run.folder.path / "trials"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._source = settle(WorkingModel(checkpoint=run.checkpoint))
        self._groups = find_groups(self._source)

    def run(self, *, accept: bool, archive: bool) -> CompressResult:
        trials = [self._follow(recipe) for recipe in self._run.recipes]
        made = {trial.name: open_checkpoint(trial.artifact) for trial in trials}
        made = {
            name: checkpoint
            for name, checkpoint in made.items()
            if can_exchange(self._source.checkpoint, checkpoint, self._groups)
        }
        if made:
            options: list[str | None] = [None, *made]
            losses = self._losses(made)
            sizes = self._sizes(trials, made)
            table = [
                [(sizes[name][index], losses[name][index]) for name in options]
                for index in range(len(self._groups))
            ]
            for choice in self._promising(front_of_sums(table), sizes, trials, made):
                picked = [options[index] for index in choice.options]
                trials.append(self._mix(made, picked, trials, len(trials)))
        best = min(trials, key=self._rank)
        report = {**best.report, "search": self._describe(trials, best)}
        self._plot(trials, best)
        return self._run.conclude(best.artifact, report, accept=accept, archive=archive)

    def _follow(self, recipe: Recipe) -> _Trial:
        artifact = self._folder / Path(recipe.name).stem
        report = finished_report(artifact)
        if report is None:
            shutil.rmtree(artifact, ignore_errors=True)
            report = self._run.make(recipe, artifact, self._progress, started=time.monotonic())
        return _Trial(Path(recipe.name).stem, artifact, report, is_whole=True)

    def _losses(self, made: dict[str, Checkpoint]) -> dict[str | None, list[float]]:
        """Of each recipe, what each group alone loses by it."""
        run = self._run
        assert run.judge is not None
        judge = run.judge.narrowed(_WINDOWS if writes_text(run.checkpoint) else _ROWS)
        losses: dict[str | None, list[float]] = {None: [0.0] * len(self._groups)}
        total = len(made) * len(self._groups)
        for name in made:
            losses[name] = []
            for index in range(len(self._groups)):
                self._progress("groups", sum(map(len, losses.values())) - len(self._groups), total)
                chosen = [name if other == index else None for other in range(len(self._groups))]
                folder = self._folder / "group"
                shutil.rmtree(folder, ignore_errors=True)
                write_artifact(mix(self._source, made, self._groups, chosen), folder, {})
                losses[name].append(_loss(judge.judge(folder)))
                shutil.rmtree(folder)
        return losses

    def _sizes(self, trials: Sequence[_Trial], made: dict[str, Checkpoint]) -> dict[str | None, list[float]]:
        """Bytes of each group, as each recipe stores it."""
        sizes: dict[str | None, list[float]] = {}
        of_source = {
            name: tensor.format.num_bytes(tensor.shape) for name, tensor in self._source.tensors.items()
        }
        sizes[None] = [float(sum(of_source[name] for name in group.matrices)) for group in self._groups]
        for trial in trials:
            if trial.name in made:
                stored = {layer["name"]: layer["bytes"] for layer in trial.report["layers"]}
                sizes[trial.name] = [
                    float(sum(stored[name] for name in group.matrices)) for group in self._groups
                ]
        return sizes

    def _promising(
        self,
        choices: Sequence[Choice],
        sizes: dict[str | None, list[float]],
        trials: Sequence[_Trial],
        made: dict[str, Checkpoint],
    ) -> list[Choice]:
        """Mixtures to measure: half of them the best that the size allows, the rest over the whole range."""
        rest = min(
            trial.report["size"]["after_bytes"] - sum(sizes[trial.name])
            for trial in trials
            if trial.name in made
        )
        mixed = [choice for choice in choices if len(set(choice.options)) > 1]
        limits = [limit for limit in self._budget.limits if limit.name == "size"]
        most = float("inf")
        for limit in limits:
            most = limit.value * (self._run.source_bytes if limit.is_share else 1.0) - rest
        fitting = [choice for choice in mixed if choice.size <= most]
        picked = fitting[-((self._num_trials + 1) // 2) :]
        others = [choice for choice in mixed if choice not in picked]
        count = min(self._num_trials - len(picked), len(others))
        spaced = [others[round((index + 0.5) * len(others) / count - 0.5)] for index in range(count)]
        return [*picked, *spaced]

    def _mix(
        self, made: dict[str, Checkpoint], picked: list[str | None], trials: Sequence[_Trial], number: int
    ) -> _Trial:
        name = f"mix-{number - len(self._run.recipes) + 1}"
        artifact = self._folder / name
        groups = {group.name: recipe or _SOURCE for group, recipe in zip(self._groups, picked, strict=True)}
        report = finished_report(artifact)
        if report is None or report["recipe"]["groups"] != groups:
            shutil.rmtree(artifact, ignore_errors=True)
            used = {Path(recipe.name).stem: recipe for recipe in self._run.recipes}
            document = {
                "name": name,
                "groups": groups,
                "matrices": {group.name: list(group.matrices) for group in self._groups},
                "recipes": {name: used[name].to_json() for name in dict.fromkeys(picked) if name is not None},
            }
            context = self._context(picked, trials)
            model = mix(self._source, made, self._groups, picked)
            report = self._run.write(
                model, document, context, artifact, self._progress, started=time.monotonic()
            )
        return _Trial(name, artifact, report, is_whole=False)

    def _context(self, picked: list[str | None], trials: Sequence[_Trial]) -> Context:
        """What the recipes did to the matrices that were picked of them."""
        by_name = {trial.name: trial.report for trial in trials}
        layers = [
            LayerError(layer["name"], error["step"], error["relative_error"], error["on"])
            for group, recipe in zip(self._groups, picked, strict=True)
            if recipe is not None
            for layer in by_name[recipe]["layers"]
            if layer["name"] in group.matrices
            for error in layer["errors"]
        ]
        notes = [
            note for name in dict.fromkeys(picked) if name is not None for note in by_name[name]["notes"]
        ]
        return Context(source=self._run.checkpoint.path, scratch=self._folder, layers=layers, notes=notes)

    def _rank(self, trial: _Trial) -> tuple[float, float, float]:
        values = measured_values(trial.report)
        return self._budget.excess(values), -values["quality"], values["size"]

    def _describe(self, trials: Sequence[_Trial], best: _Trial) -> Sequence[JsonObject]:
        on_front = self._front(trials)
        described = []
        for trial in trials:
            verdicts = self._budget.check(measured_values(trial.report))
            judged = with_budget(trial.report, self._budget.text, verdicts)
            described.append(
                {
                    "name": trial.name,
                    **measured_values(trial.report),
                    "groups": trial.report["recipe"].get("groups"),
                    "is_met": judged["budget"]["is_met"],
                    "is_on_front": trial.name in on_front,
                    "is_chosen": trial is best,
                }
            )
        return described

    def _front(self, trials: Sequence[_Trial]) -> set[str]:
        values = [measured_values(trial.report) for trial in trials]
        best = front(trials, [(value["size"], -value["quality"]) for value in values])
        return {trial.name for trial in best}

    def _plot(self, trials: Sequence[_Trial], best: _Trial) -> None:
        on_front = self._front(trials)
        points = []
        for trial in trials:
            values = measured_values(trial.report)
            points.append(
                Point(
                    name=trial.name,
                    size_bytes=values["size"],
                    change=values["quality"],
                    is_on_front=trial.name in on_front,
                    is_chosen=trial is best,
                    figures=_figures(values, trial.report["recipe"].get("groups")),
                )
            )
        limits: dict[str, Any] = {limit.name: limit for limit in self._budget.limits}
        size, quality = limits.get("size"), limits.get("quality")
        most = None
        if size is not None:
            most = size.value * (self._run.source_bytes if size.is_share else 1.0)
        plot_front(
            points,
            best.artifact / REPORT_FOLDER,
            title=f"{Path(self._run.spec).name} under {self._budget.text}",
            most_bytes=most,
            least_change=None if quality is None else quality.value,
        )


def _loss(quality: Quality) -> float:
    """How far a model is from its source: KL where it is measured, else what the metric lost."""
    apart = quality.apart.get("mean_kl")
    return max(apart.value if apart is not None else -quality.change, 0.0)


def _figures(values: dict[str, float], groups: dict[str, str] | None) -> dict[str, str]:
    """Of a trial, for people."""
    figures = {"size, MB": f"{values['size'] / 1e6:.2f}", "quality": f"{values['quality']:+.2%}"}
    for name in ("decode", "prefill", "latency"):
        if name in values:
            figures[f"{name}, ms"] = f"{values[name]:.3g}"
    if groups:
        figures["groups"] = ", ".join(f"{group}: {recipe}" for group, recipe in groups.items())
    return figures
