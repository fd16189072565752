"""A run of compression: its arguments checked, a recipe followed, an artifact written, measured and named."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from fastserve.checkpoint.archive import write_archive
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.compress.artifact import (
    check_artifact,
    folder_bytes,
    publish,
    settle,
    write_artifact,
    write_settings,
)
from fastserve.compress.budget import Budget, parse_budget
from fastserve.compress.calibration_text import calibration_tokens
from fastserve.compress.lineage import digest, make_lineage
from fastserve.compress.model_kind import writes_text
from fastserve.compress.precondition import check_budget, check_finite, check_needs, check_steps
from fastserve.compress.probe import make_probes
from fastserve.compress.quality import Judge, open_judge
from fastserve.compress.recipe import Recipe, read_recipe
from fastserve.compress.report import (
    REPORT_FOLDER,
    build_report,
    measured_values,
    with_budget,
    write_report,
)
from fastserve.compress.speed import measure_speeds
from fastserve.compress.step import Context, WorkingModel
from fastserve.errors import OptionError
from fastserve.hub.resolve import resolve
from fastserve.tune.run_folder import RunFolder
from fastserve.types import JsonObject

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class CompressResult:
    """
    Attributes:
        path: the model directory; None where it was refused.
        report: as `compression/report.json` has it.
    """

    path: Path | None
    report: JsonObject

    @property
    def is_refused(self) -> bool:
        """Whether a budget was not kept, and nobody said that the artifact is to be had all the same."""
        return self.path is None


@dataclass(frozen=True, kw_only=True)
class CompressData:
    """Files that a run may be given.

    Attributes:
        calibration: text, or rows of any task, that steps are calibrated on.
        judged: text, or rows of the model's task, that it is judged by.
        train, dev: rows or text for steps that tune.
        task: of these, as `fastserve tune` has it; None: a language model.
    """

    calibration: Path | None = None
    judged: Path | None = None
    train: Path | None = None
    dev: Path | None = None
    task: str | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Those that are given, by what they are for."""
        named = {"calibration": self.calibration, "data": self.judged, "train": self.train, "dev": self.dev}
        return {name: path for name, path in named.items() if path is not None}


@dataclass(frozen=True, kw_only=True)
class CompressRun:
    """A run whose arguments have been checked: the model opened, recipes and budget read."""

    spec: str
    checkpoint: Checkpoint
    recipes: tuple[Recipe, ...]
    folder: RunFolder
    data: CompressData
    budget: Budget | None
    limit: int | None
    seed: int
    threads: int | None
    judge: Judge | None
    calibration: Mapping[str, Seq[Seq[int]]]  # by the names of recipes that calibrate

    @property
    def request(self) -> JsonObject:
        """What a run that is resumed must have been asked for too."""
        return {
            "model": self.spec,
            "weights_sha256": digest(self.checkpoint.files),
            "recipes": [recipe.to_json() for recipe in self.recipes],
            "data": {name: digest([path]) for name, path in self.data.files.items()},
            "task": self.data.task,
            "limit": self.limit,
            "seed": self.seed,
        }

    @property
    def source_bytes(self) -> int:
        """Of the source's weights on the disk."""
        path = self.checkpoint.path
        files = [path] if path.is_file() else [*path.glob("*.safetensors")]
        return sum(map(folder_bytes, files))

    def make(self, recipe: Recipe, artifact: Path, progress: Progress, *, started: float) -> JsonObject:
        """Follow a recipe, write what comes of it and its report into a folder, and give the report."""
        context = self.context(recipe, progress)
        model = self.follow(recipe, context)
        return self.write(
            model, {"name": recipe.name, **recipe.to_json()}, context, artifact, progress, started=started
        )

    def context(self, recipe: Recipe, progress: Progress) -> Context:
        """What the steps of a recipe may use."""
        scratch = self.folder.path / "scratch"
        scratch.mkdir(exist_ok=True)
        return Context(
            source=self.checkpoint.path,
            scratch=scratch,
            calibration=self.calibration.get(recipe.name, ()),
            train=self.data.train,
            dev=self.data.dev,
            task=self.data.task,
            seed=self.seed,
            threads=self.threads,
            progress=progress,
        )

    def follow(self, recipe: Recipe, context: Context) -> WorkingModel:
        """The model after all steps."""
        model = WorkingModel(checkpoint=self.checkpoint)
        for named in recipe.steps:
            model = named.step.run(model, context)
        settled = settle(model)
        changed = [name for name, tensor in model.tensors.items() if settled.tensors[name] is not tensor]
        if changed:
            context.notes.append(
                f"{len(changed)} {'tensor' if len(changed) == 1 else 'tensors'} in blocks of GGUF became "
                f"bfloat16, as no step changed them: {changed[0]}{', ...' if changed[1:] else ''}"
            )
        return settled

    def write(
        self,
        model: WorkingModel,
        recipe: JsonObject,
        context: Context,
        artifact: Path,
        progress: Progress,
        *,
        started: float,
    ) -> JsonObject:
        """Write a settled model with its probes, lineage and report. Returns the report."""
        progress("writing", 0, 1)
        lineage = make_lineage(self.spec, self.checkpoint, recipe, self.data.files, self.seed)
        sizes = write_artifact(model, artifact, {"lineage": lineage})
        progress("probes", 0, 1)
        probes = make_probes(model, artifact, threads=self.threads)
        quality = None
        if self.judge is not None:
            quality = self.judge.judge(artifact, progress)
        speeds = measure_speeds(
            {"before": self.checkpoint.path, "after": artifact}, threads=self.threads, progress=progress
        )
        report = build_report(
            model=self.spec,
            recipe=recipe,
            source_bytes=self.source_bytes,
            sizes=sizes,
            layers=context.layers,
            notes=list(dict.fromkeys(context.notes)),
            quality=quality,
            speeds=speeds,
            seconds=time.monotonic() - started,
        )
        evaluation = {key: report[key] for key in ("size", "quality", "speed")}
        card = {
            **model.checkpoint.card,
            **({} if quality is None else {"metrics": quality.values}),
            "lineage": lineage,
            "compression": evaluation,
            "probes": list(probes),
        }
        write_settings(artifact, card)
        write_report(report, artifact, name=self.folder.output.name)
        return report

    def conclude(self, artifact: Path, report: JsonObject, *, accept: bool, archive: bool) -> CompressResult:
        """Give the artifact, or its archive, its name, unless the budget is not kept and it is not accepted
        so."""
        made = artifact
        if archive:
            made = self.folder.path / "archive"
            report = {**report, "archive": write_checked_archive(artifact, made)}
        if self.budget is not None:
            verdicts = self.budget.check(measured_values(report))
            report = with_budget(report, self.budget.text, verdicts)
        write_report(report, artifact, name=self.folder.output.name)
        if self.budget is not None and not accept and not report["budget"]["is_met"]:
            return CompressResult(None, report)
        if archive:
            shutil.copytree(artifact / REPORT_FOLDER, made / REPORT_FOLDER)
            shutil.copyfile(artifact / "README.md", made / "README.md")
        publish(made, self.folder.output)
        self.folder.finish(keep=False)
        return CompressResult(self.folder.output, report)


def write_checked_archive(artifact: Path, output: Path) -> JsonObject:
    """Write the archive of an artifact, and hold what it expands to to it. Returns its sizes.

    Raises:
        UnsupportedError: constriction is not installed.
        CheckpointError: it expands to something else.
    """
    shutil.rmtree(output, ignore_errors=True)
    sizes = write_archive(artifact, output)
    check_artifact(WorkingModel(checkpoint=open_checkpoint(artifact)), output)
    return {name: value for name, value in sizes.to_json().items() if name != "weights"}


def prepare(
    model: str | Path,
    recipes: list[str | Path],
    output: str | Path,
    data: CompressData | None,
    budget: str | None,
    *,
    limit: int | None,
    seed: int,
    threads: int | None,
) -> CompressRun:
    """Check all that can be checked before anything is computed. Arguments and errors as of `compress`."""
    data = data or CompressData()
    for name, file in data.files.items():
        if not file.is_file():
            raise OptionError(f"{name}: no file is at {file}", hint="give the path of a file", option=name)
    read = tuple(read_recipe(recipe) for recipe in recipes)
    for recipe in read:
        check_needs(recipe, data.files)
    parsed = None if budget is None else parse_budget(budget)
    path = resolve(model)
    output = Path(output).expanduser()
    if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
        raise OptionError(
            f"output: {output} lies in the source model, which is not changed",
            hint="name a folder beside it",
            option="output",
        )
    checkpoint = open_checkpoint(path)
    writes_text(checkpoint)  # refuses what neither writes nor reads
    if parsed is not None:
        check_budget(parsed, checkpoint, has_data=data.judged is not None)
    given = Context(source=path, scratch=output, train=data.train, dev=data.dev, task=data.task, seed=seed)
    for recipe in read:
        check_steps(recipe, checkpoint, given)
    calibration = {
        recipe.name: calibration_tokens(
            checkpoint,
            data.calibration,
            num_sequences=recipe.calibration.sequences,
            length=recipe.calibration.length,
            seed=seed,
        )
        for recipe in read
        if recipe.calibrates
    }
    check_finite(checkpoint)
    judge = None
    if data.judged is not None:
        judge = open_judge(path, data.judged, limit=limit, threads=threads, seed=seed)
    return CompressRun(
        spec=str(model),
        checkpoint=checkpoint,
        recipes=read,
        folder=RunFolder(output),
        data=data,
        budget=parsed,
        limit=limit,
        seed=seed,
        threads=threads,
        judge=judge,
        calibration=calibration,
    )


def finished_report(artifact: Path) -> JsonObject | None:
    """The report of an artifact that an earlier run has made, but was refused."""
    path = artifact / REPORT_FOLDER / "report.json"
    if not path.is_file():
        return None
    document: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in document.items() if key not in ("archive", "budget", "search")}
