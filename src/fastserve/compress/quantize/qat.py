"""The step `qat`: a model is tuned while it computes with the numbers that it will be stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

import torch

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.prune.training import Tuning, check_tuning, read_tuning, tune_model
from fastserve.compress.quantize.fake_quantization import (
    Activations,
    FakeQuantization,
    ScaleRule,
    quantize_as_learned,
    without_quantizers,
)
from fastserve.compress.quantize.grid import Grid
from fastserve.compress.quantize.step import find_quantizable, read_matrix, weight_error
from fastserve.compress.step import Context, LayerError, Need, Targets, WorkingModel
from fastserve.errors import OptionError
from fastserve.option import check_choice


@dataclass(frozen=True, kw_only=True)
class Qat(Grid):
    """The step `qat`: quantization-aware fine-tuning on the context's rows; of a language model on its text.
    Zeros of a pruned model stay.

    Attributes:
        scales: `learned` with the weights, or found anew for the weights of each step as by `rtn`.
        activations: `int8` has matrices meet activations that are rounded as in the native runtime.
        distil: learn from the model that compression began with, too: it has learned the task.
        tune: options of `fastserve tune` by name, those of learning from a teacher among them where `distil`
            is said; and `on_problem`.
        targets: which matrices.

    Raises:
        OptionError: an option that tuning does not have, or that does not go with the others.
    """

    scales: ScaleRule = "learned"
    activations: Activations = "float"
    distil: bool = False
    tune: Mapping[str, Any] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scales", self.scales, get_args(ScaleRule))
        check_choice("activations", self.activations, get_args(Activations))
        if self.activations == "int8" and self.bits == 8 and not self.symmetric:
            raise OptionError(
                "activations='int8' is not for 8 bits with zero points: the runtime has those as floats",
                hint="leave out symmetric: false, or activations",
                option="activations",
            )
        if "teacher" in self.tune:
            raise OptionError(
                "tune: a teacher is named", hint="say distil: true, which makes the source one", option="tune"
            )
        read_tuning(self._values("teacher"))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"train"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        find_quantizable(self, model, self.targets, context)
        check_tuning(model, context, read_tuning(self._values(str(context.source)), context), step="qat")

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        names = find_quantizable(self, model, self.targets, context)
        for name in names:
            read_matrix(model, name)
        grid = Grid(**{each.name: getattr(self, each.name) for each in fields(Grid)})
        change = FakeQuantization(names=names, grid=grid, scales=self.scales, activations=self.activations)
        tuning = read_tuning(self._values(str(context.source)), context)
        tuned = tune_model(model, context, Tuning(tuning.options, tuning.on_problem, change), step="qat")
        scales = change.read(tuned.tensors)
        plain = replace(
            tuned, checkpoint=replace(tuned.checkpoint, tensors=without_quantizers(tuned.tensors))
        )
        changed: dict[str, StoredTensor] = {}
        for name in scales:
            values = read_matrix(plain, name)
            changed[name] = quantize_as_learned(name, values, scales[name])
            error = weight_error(values, torch.from_numpy(to_f32(changed[name])))
            context.layers.append(LayerError(name, "qat", error, "weights"))
        return plain.with_tensors(changed, int8_activations=model.int8_activations - changed.keys())

    def _values(self, teacher: str) -> dict[str, Any]:
        """Options of tuning by name."""
        return {**self.tune, "teacher": teacher} if self.distil else dict(self.tune)
