"""Searches hyper-parameters with Optuna: a study of trials in a file of SQLite, each a tuning run, bad ones
stopped early; the best one's model becomes the output."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.data.problem import Problem
from fastserve.errors import OptionError, StepError, UnsupportedError
from fastserve.evaluate.plot import check_plot
from fastserve.evaluate.search_plot import plot_search
from fastserve.evaluate.task.task import LOWER_IS_BETTER
from fastserve.option import check_integer
from fastserve.tune.options import TuneOptions, read_mapping
from fastserve.tune.prepared_run import default_metric
from fastserve.tune.run import TuneResult
from fastserve.tune.tuning import tune
from fastserve.types import JsonObject

if TYPE_CHECKING:
    from fastserve.tune.trainer import Progress

_WARM_TRIALS = 3  # that nothing is stopped in, so that there is something to compare with
# Else trials are not comparable.
_FIXED = ("metric", "processes", "shard", "tensor_parallel", "device", "keep_checkpoints", "problem")
_MOST_COMBINATIONS = 4096  # that are checked before the first trial; a second of work
_ENDED = ("COMPLETE", "PRUNED")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; drawn by their logarithm with `log`, else every `step`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


Space = Mapping[str, Range | tuple[Any, ...]]
"""Options of `TuneOptions` by name, each a range or a choice of values."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a study has found.

    Attributes:
        best: the run whose model is the output.
        best_options: what it had of the space.
        num_complete, num_pruned: trials that ended, and that were stopped early.
        importance: of each option, the share of the metric's variance that it explains; empty of few trials.
    """

    best: TuneResult
    best_options: JsonObject
    num_complete: int
    num_pruned: int
    importance: dict[str, float]

    def to_json(self) -> JsonObject:
        """The best run's figures, and those of the study."""
        return {**self.best.to_json(), "search": {k: v for k, v in asdict(self).items() if k != "best"}}


def read_space(path: Path) -> Space:
    """A search space: a YAML, TOML or JSON file.

        learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}
        batch_size: [8, 16, 32]

    Raises:
        OptionError: the file is missing or broken, names what is no option, or a range is empty.
    """
    known = {field.name for field in fields(TuneOptions)} - set(_FIXED)
    space: dict[str, Range | tuple[Any, ...]] = {}
    for name, value in read_mapping(path, option="search").items():
        option = str(name).replace("-", "_")
        if option not in known:
            raise OptionError(
                f"{path}: {name!r} is no option that can be searched",
                hint=f"choose among {', '.join(sorted(known))}",
                option="search",
            )
        space[option] = _read_values(path, option, value)
    if not space:
        raise OptionError(f"{path} names no options", hint="give at least one to search", option="search")
    return space


def search(
    task: str,
    *,
    model: str,
    train: str | Path,
    dev: str | Path,
    output: str | Path,
    space: Space,
    trials: int,
    options: TuneOptions | None = None,
    on_problem: Mapping[str, str] | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
    report_problem: Callable[[Problem], None] | None = None,
) -> SearchResult:
    """Tune `trials` times with options drawn from `space` (TPE; Bergstra et al. 2011), and keep the best
    model.

    The study is in `OUTPUT.search/study.db`; with `resume` it goes on until `trials` have ended. A trial is
    stopped at an evaluation where it is worse than the median of the earlier ones at that evaluation.

    Raises:
        OptionError: an option is out of its range; the output, or a study that is not to be resumed, is
            there; a combination that may be drawn is refused by `TuneOptions`.
        StepError: no trial ended with a finite metric.
        UnsupportedError: Optuna is not installed.
        As `tune`.
    """
    try:
        import optuna
    except ImportError as error:
        raise UnsupportedError(f"search needs Optuna: {error}", hint="pip install optuna") from error
    check_integer("trials", trials, low=1)
    options = options or TuneOptions()
    _check_space(space, options)
    output = Path(output)
    folder = output.with_name(f"{output.name}.search")
    if output.exists():
        raise OptionError(f"output: {output} is there already", hint="name another folder", option="output")
    if folder.exists() and not resume:
        raise OptionError(
            f"output: an unfinished search is in {folder}",
            hint="--resume goes on with it; remove the folder to start anew",
            option="output",
        )
    folder.mkdir(parents=True, exist_ok=True)
    check_plot(folder)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    metric = options.metric or default_metric(
        task, model=model, train=train, options=options, on_problem=on_problem or {}
    )
    chosen = replace(options, metric=metric)
    study = _open_study(folder, task, chosen, space)

    def run_trial(trial: Any) -> float:
        drawn = {name: _draw(trial, name, values) for name, values in space.items()}
        num_evaluations = 0

        def on_evaluate(step: int, metrics: dict[str, float]) -> None:
            nonlocal num_evaluations
            num_evaluations += 1
            trial.report(metrics[metric], num_evaluations)
            if trial.should_prune():
                raise optuna.TrialPruned

        place = folder / f"trial-{trial.number}"
        try:
            result = tune(
                task,
                model=model,
                train=train,
                dev=dev,
                output=place,
                options=replace(chosen, **drawn),
                on_problem=on_problem,
                report=report,
                report_problem=None if trial.number else report_problem,  # told once
                on_evaluate=on_evaluate,
            )
        except optuna.TrialPruned:
            shutil.rmtree(place.with_name(f"{place.name}.run"), ignore_errors=True)
            raise
        if not math.isfinite(
            result.metrics[metric]
        ):  # it diverged; Optuna would have it drawn again, for ever
            raise optuna.TrialPruned
        trial.set_user_attr("result", result.to_json())
        return result.metrics[metric]

    while (num_ended := sum(trial.state.name in _ENDED for trial in study.trials)) < trials:
        # Another seed each time: a sampler that is made anew would draw again what it drew first.
        study.sampler = optuna.samplers.TPESampler(seed=options.seed + num_ended)
        study.optimize(run_trial, n_trials=1)
        _forget_worse(study, folder)
    if not any(trial.state.name == "COMPLETE" for trial in study.trials):
        raise StepError(
            f"none of {trials} trials has a finite {metric}",
            hint=f"remove {folder} and search lower learning rates, or resume with more trials",
        )
    result = _finish(study, folder, output, metric)
    shutil.rmtree(folder)
    return result


def _check_space(space: Space, options: TuneOptions) -> None:
    """Refuse what a trial would be refused for, hours later: all combinations of choices and ends of ranges
    are tried, the first thousands of them where there are more."""
    names = list(space)
    values = [values if isinstance(values, tuple) else _ends(name, values) for name, values in space.items()]
    for combination in islice(product(*values), _MOST_COMBINATIONS):
        drawn = dict(zip(names, combination, strict=True))
        try:
            replace(options, **drawn)
        except OptionError as error:
            told = ", ".join(f"{name}={value!r}" for name, value in drawn.items())
            raise OptionError(
                f"search: a trial with {told} would be refused: {error.message}",
                hint=error.hint,
                option="search",
            ) from error


def _ends(name: str, values: Range) -> tuple[float, float]:
    return (int(values.low), int(values.high)) if _is_whole(name) else (values.low, values.high)


def _is_whole(name: str) -> bool:
    return "int" in str(TuneOptions.__annotations__[name])


def _forget_worse(study: Any, folder: Path) -> None:
    """Remove the models of all trials but the best, and what killed ones have left."""
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    best = study.best_trial.number if complete else None
    for trial in study.trials:
        if trial.number != best:
            for suffix in ("", ".run", ".part"):
                shutil.rmtree(folder / f"trial-{trial.number}{suffix}", ignore_errors=True)


def _open_study(folder: Path, task: str, options: TuneOptions, space: Space) -> Any:
    import optuna

    study = optuna.create_study(
        study_name="tune",
        storage=f"sqlite:///{folder / 'study.db'}",
        load_if_exists=True,
        direction="minimize" if options.metric in LOWER_IS_BETTER else "maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_WARM_TRIALS),
    )
    request = json.loads(
        json.dumps({"task": task, "options": asdict(options), "space": {k: str(v) for k, v in space.items()}})
    )
    before = study.user_attrs.get("request")
    if before not in (None, request):
        name = next(key for key in request if before.get(key) != request[key])
        raise OptionError(
            f"{name} differs from that of the search in {folder}",
            hint="resume with what it began with, or remove its folder to start anew",
            option="search",
        )
    study.set_user_attr("request", request)
    return study


def _finish(study: Any, folder: Path, output: Path, metric: str) -> SearchResult:
    best = study.best_trial
    model = folder / f"trial-{best.number}"
    importance = _importance(study)
    history = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "options": trial.params,
        }
        for trial in study.trials
    ]
    report = model / "search"
    points = [(trial.number, trial.value) for trial in study.trials if trial.state.name == "COMPLETE"]
    plot_search(points, importance, report, metric=metric)
    (report / "trials.json").write_text(
        json.dumps({"metric": metric, "importance": importance, "trials": history}, indent=2),
        encoding="utf-8",
    )
    os.replace(model, output)
    return SearchResult(
        best=TuneResult(**{**best.user_attrs["result"], "path": output}),
        best_options=dict(best.params),
        num_complete=len(points),
        num_pruned=sum(entry["state"] == "pruned" for entry in history),
        importance=importance,
    )


def _importance(study: Any) -> dict[str, float]:
    """By PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), which needs no other library."""
    import warnings

    import optuna

    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if len(complete) < 2 or len({trial.value for trial in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _read_values(path: Path, name: str, value: Any) -> Range | tuple[Any, ...]:
    if isinstance(value, list) and value:
        return tuple(value)
    if isinstance(value, Mapping) and {"low", "high"} <= value.keys() <= {"low", "high", "log", "step"}:
        try:
            low, high = float(value["low"]), float(value["high"])
            step = None if value.get("step") is None else float(value["step"])
        except (TypeError, ValueError):
            raise OptionError(f"{path}: {name} has a bound that is no number", option="search") from None
        log = value.get("log", False)
        has_step = step is None or (step > 0 and not log and (step % 1 == 0 or not _is_whole(name)))
        has_ends = low < high < math.inf and not (log and low <= 0)
        are_whole = not _is_whole(name) or (low % 1 == 0 and high % 1 == 0)
        if isinstance(log, bool) and has_step and has_ends and are_whole:
            return Range(low, high, log=log, step=step)
    raise OptionError(
        f"{path}: {name} is {value!r}",
        hint="give a list of values, or {low: A, high: B} with A below B, whole where the option is, and"
        " log: true or step: C",
        option="search",
    )


def _draw(trial: Any, name: str, values: Range | tuple[Any, ...]) -> Any:
    if isinstance(values, tuple):
        return trial.suggest_categorical(name, values)
    if _is_whole(name):
        step = 1 if values.log else int(values.step or 1)
        return trial.suggest_int(name, int(values.low), int(values.high), step=step, log=values.log)
    step_size = None if values.log else values.step
    return trial.suggest_float(name, values.low, values.high, step=step_size, log=values.log)
