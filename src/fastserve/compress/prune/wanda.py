"""Wanda: weights go by their magnitude times the norm of what they multiply with (Sun et al.,
arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.calibration import walk
from fastserve.compress.prune.matrix import note_dequantized, write_matrix
from fastserve.compress.prune.pattern import Pattern, check_scope, mask_of, read_pattern
from fastserve.compress.quantize.gram import Gram, relative_output_error
from fastserve.compress.station import Station
from fastserve.compress.step import Context, LayerError, Targets, WorkingModel
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
    def calibrates(self) -> bool:
        return True

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        names = model.matrices(self.targets)
        pattern = read_pattern(self.pattern, self.sparsity)
        for name in names:
            pattern.check(name, model.tensors[name].shape)
        note_dequantized(context, model, names, "wanda")
        return walk(model, context, _Visitor(self, pattern, model, context, frozenset(names)), names=names)


class _Visitor:
    def __init__(
        self, step: Wanda, pattern: Pattern, model: WorkingModel, context: Context, names: frozenset[str]
    ) -> None:
        self._step = step
        self._pattern = pattern
        self._model = model
        self._context = context
        self._names = names
        self._gram: Gram | None = None

    @property
    def key(self) -> str:
        return repr(self._step)

    def observe(self, station: Station, x: torch.Tensor) -> None:
        self._gram = self._gram or Gram(x.shape[1])
        self._gram.add(x)

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        assert self._gram is not None
        gram, self._gram = self._gram.matrix(station.names[0]), None
        norms = gram.diagonal().sqrt().float()
        changed: dict[str, StoredTensor] = {}
        for name, weights in station.values.items():
            if name not in self._names:
                continue
            scores = (weights.abs() * norms).numpy()
            mask = torch.from_numpy(mask_of(scores, self._pattern, by_row=self._step.scope != "matrix"))
            pruned = weights.masked_fill(mask, 0)
            self._context.layers.append(
                LayerError(name, "wanda", relative_output_error(weights, pruned, gram), "outputs")
            )
            changed[name] = write_matrix(self._model.tensors[name], pruned.numpy())
        return changed
