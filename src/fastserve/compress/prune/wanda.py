"""Wanda: weights go by their magnitude times the norm of what they multiply with (Sun et al.,
arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from fastserve.compress.prune.by_outputs import Prune, prune_by_outputs
from fastserve.compress.prune.matrix import find_prunable
from fastserve.compress.prune.pattern import Pattern, check_scope, mask_of, read_pattern
from fastserve.compress.step import Context, Need, Targets, WorkingModel
from fastserve.option import check_choice


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """The step `wanda`: a weight's score is |W[i, j]| * ||X[:, j]||, compared within its row (section 3).

    Attributes:
        sparsity, pattern: as of the step `magnitude`; a block goes by the sum of its scores.
        scope: `row`, as the paper has it, or `matrix`; None is the row. Not with N:M.

    Raises:
        OptionError: no such pattern or scope, a sparsity out of range.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    scope: Literal["row", "matrix"] | None = None
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        if self.scope is not None:
            check_choice("scope", self.scope, ("row", "matrix"))
        check_scope(self.scope, read_pattern(self.pattern, self.sparsity))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        find_prunable(model, self.targets, read_pattern(self.pattern, self.sparsity))

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        return prune_by_outputs(self, model, context, name="wanda")

    def pruner(self, gram: torch.Tensor, pattern: Pattern, name: str) -> Prune:
        """What prunes the matrices that multiply with the inputs of a Gram matrix [in, in]."""
        norms = gram.diagonal().sqrt().float()

        def prune(weights: torch.Tensor) -> torch.Tensor:
            scores = (weights.abs() * norms).numpy()
            mask = mask_of(scores, pattern, by_row=self.scope != "matrix")
            return weights.masked_fill(torch.from_numpy(mask), 0)

        return prune
