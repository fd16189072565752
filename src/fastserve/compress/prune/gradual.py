"""Gradual pruning: a little more each time, with tuning in between (Zhu & Gupta, arXiv 1710.01878)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastserve.compress.prune.magnitude import Magnitude
from fastserve.compress.prune.matrix import find_prunable
from fastserve.compress.prune.pattern import read_pattern
from fastserve.compress.prune.sparsegpt import SparseGpt
from fastserve.compress.prune.training import check_tuning, read_tuning, tune_model
from fastserve.compress.prune.wanda import Wanda
from fastserve.compress.step import Context, Need, Targets, WorkingModel
from fastserve.errors import OptionError
from fastserve.option import check_choice, check_integer, check_number

Method = Literal["magnitude", "wanda", "sparsegpt"]
_METHODS: Mapping[str, Any] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGpt}


def sparsity_at(step: int, steps: int, *, first: float, last: float) -> float:
    """The cubic schedule of the paper (equation 1): fast at first, where much is redundant, then ever slower.

    >>> [sparsity_at(step, 2, first=0.0, last=0.5) for step in range(3)]
    [0.0, 0.4375, 0.5]
    """
    return last + (first - last) * (1 - step / steps) ** 3


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """The step `gradual`.

    Attributes:
        sparsity: share of entries that are gone in the end.
        first: share that the schedule begins at; the first pruning goes beyond it already.
        steps: how often it prunes and tunes.
        method: the step that prunes, with its own defaults.
        pattern: `unstructured`, or blocks as `1x4`.
        tune: options of `fastserve tune` by name, of each time; and `on_problem`.

    Raises:
        OptionError: a number out of range, N:M, which has no steps between, or an option that tuning does not
            have.
    """

    sparsity: float = 0.5
    first: float = 0.0
    steps: int = 4
    method: Method = "magnitude"
    pattern: str = "unstructured"
    tune: Mapping[str, Any] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        check_number("first", self.first, 0.0, self.sparsity)
        check_integer("steps", self.steps, low=1)
        check_choice("method", self.method, tuple(_METHODS))
        if read_pattern(self.pattern, self.sparsity).kept is not None:
            raise OptionError(
                f"gradual has no steps on the way to pattern={self.pattern!r}",
                hint="choose unstructured or a block, or prune at once and recover",
                option="pattern",
            )
        read_tuning(self.tune)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"train"} if self.method == "magnitude" else {"train", "calibration"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        find_prunable(model, self.targets, read_pattern(self.pattern, self.sparsity))
        check_tuning(model, context, read_tuning(self.tune, context), step="gradual")

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        tuning = read_tuning(self.tune, context)
        for step in range(1, self.steps + 1):
            context.progress("gradual", step - 1, self.steps)
            share = sparsity_at(step, self.steps, first=self.first, last=self.sparsity)
            prune = _METHODS[self.method](sparsity=share, pattern=self.pattern, targets=self.targets)
            model = tune_model(prune.run(model, context), context, tuning, step="gradual")
        return model
