"""The step `distil`: a student is made of the model, and learns from the source."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

from fastserve.compress.distil.student import Student, StudentOptions, make_student
from fastserve.compress.prune.training import Tuning, check_tuning, read_tuning, tune_model
from fastserve.compress.step import Context, Need, WorkingModel
from fastserve.errors import DataError, OptionError
from fastserve.option import check_integer

_OF_LAYERS = ("hidden_weight", "attention_weight")


@dataclass(frozen=True, kw_only=True)
class Distil:
    """A model with fewer layers, or another config, learns from what compression began with.

    Attributes:
        share, layers, config: of the student, as of `StudentOptions`; half of the layers unless they say
            otherwise.
        students: several of them, from which the best after `search_steps` is chosen, by the metric of the
            dev rows; what has more than `most_parameters` is left out.
        search_steps: of the optimizer, for each student.
        most_parameters: of a student; None: any number.
        tune: options of `fastserve tune` by name, those of learning from a teacher among them: `soft_weight`,
            `soft_temperature`, `hidden_weight`, `attention_weight`, `layer_map`, `teacher_processes`.

    Raises:
        OptionError: an option that tuning does not have, or two ways to name a student.
    """

    share: float | None = None
    layers: tuple[int, ...] | None = None
    config: Mapping[str, Any] | None = None
    students: tuple[StudentOptions, ...] = ()
    search_steps: int = 100
    most_parameters: int | None = None
    tune: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("search_steps", self.search_steps, low=1)
        if self.most_parameters is not None:
            check_integer("most_parameters", self.most_parameters, low=1)
        if self.students and (self.share is not None or self.layers is not None or self.config):
            raise OptionError(
                "students are named twice", hint="leave out share, layers and config", option="students"
            )
        if not self.students:
            self._only_student()
        read_tuning(self._taught("teacher"))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"train", "dev"} if len(self.students) > 1 else {"train"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        students = [make_student(model, each, seed=context.seed) for each in self._choices()]
        if len(students) > 1:
            self._fitting(students)
        tuning = read_tuning(self._taught(str(context.source)), context)
        check_tuning(model, context, tuning, step="distil")

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        students = [make_student(model, each, seed=context.seed) for each in self._choices()]
        student = students[0] if len(students) == 1 else self._search(students, context)
        context.notes.append(
            f"distil: a student of {len(student.layer_map)} layers and {student.num_parameters} parameters"
        )
        return self._teach(student, context, step="distil")

    def _choices(self) -> Seq[StudentOptions]:
        return self.students or (self._only_student(),)

    def _only_student(self) -> StudentOptions:
        if self.share is None and self.layers is None and not self.config:
            return StudentOptions(share=0.5)
        share = 1.0 if self.share is None else self.share
        return StudentOptions(share=share, layers=self.layers, config=self.config)

    def _taught(self, teacher: str) -> dict[str, Any]:
        return {**self.tune, "teacher": teacher}

    def _teach(
        self, student: Student, context: Context, *, step: str, max_steps: int | None = None
    ) -> WorkingModel:
        values = self._taught(str(context.source))
        if any(values.get(name) for name in _OF_LAYERS):
            values.setdefault("layer_map", student.layer_map)
        if max_steps is not None:
            values["max_steps"] = max_steps
        tuning = read_tuning(values, context)
        # What is exactly 0 in a student is so by chance, unless a step before pruned it.
        keeps = any(layer.step in ("magnitude", "wanda", "sparsegpt") for layer in context.layers)
        tuning = Tuning(replace(tuning.options, keep_zeros=keeps), tuning.on_problem)
        return tune_model(student.model, context, tuning, step=step)

    def _search(self, students: Seq[Student], context: Context) -> Student:
        """The student that is best after a short training.

        Raises:
            DataError: there are no dev rows to tell by.
            OptionError: none is small enough.
        """
        if context.dev is None:
            raise DataError("students are chosen by dev rows", hint="name a file with --dev")
        fitting = self._fitting(students)
        scores = [self._score(each, context) for each in fitting]
        best = max(range(len(fitting)), key=lambda index: scores[index])
        listed = ", ".join(
            f"{each.num_parameters} parameters {score:.4f}"
            for each, score in zip(fitting, scores, strict=True)
        )
        context.notes.append(f"distil: {len(fitting)} students after {self.search_steps} steps: {listed}")
        return fitting[best]

    def _fitting(self, students: Seq[Student]) -> Seq[Student]:
        """Those that are small enough."""
        most = self.most_parameters
        fitting = [each for each in students if most is None or each.num_parameters <= most]
        if not fitting:
            least = min(each.num_parameters for each in students)
            raise OptionError(
                f"most_parameters={most}: the smallest student has {least}",
                hint="allow more, or name smaller students",
                option="most_parameters",
            )
        return fitting

    def _score(self, student: Student, context: Context) -> float:
        """The metric of the dev rows after a short training; more is better."""
        from fastserve.evaluate.task.task import LOWER_IS_BETTER

        trial = replace(context, notes=[])
        trained = self._teach(student, trial, step="distil-search", max_steps=self.search_steps)
        metrics = trained.checkpoint.card["metrics"]
        metric = self.tune.get("metric") or next(iter(metrics))
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        return sign * float(metrics[metric])
