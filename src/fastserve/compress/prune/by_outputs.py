"""Pruning on calibration: what goes of a matrix is chosen by what it costs the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.calibration import walk
from fastserve.compress.prune.matrix import find_prunable, note_dequantized, write_matrix
from fastserve.compress.prune.pattern import Pattern, read_pattern
from fastserve.compress.quantize.gram import GramVisitor, relative_output_error
from fastserve.compress.station import Station
from fastserve.compress.step import Context, LayerError, Targets, WorkingModel

Prune = Callable[[torch.Tensor], torch.Tensor]
"""Of a matrix [out, in], what is left of it."""


class OutputPruning(Protocol):
    """A step that prunes so."""

    @property
    def sparsity(self) -> float | None: ...

    @property
    def pattern(self) -> str: ...

    @property
    def targets(self) -> Targets: ...

    def pruner(self, gram: torch.Tensor, pattern: Pattern, name: str) -> Prune:
        """For all matrices that multiply with the inputs of a Gram matrix [in, in], float64; messages are
        about the matrix `name`."""


def prune_by_outputs(
    step: OutputPruning, model: WorkingModel, context: Context, *, name: str
) -> WorkingModel:
    """The model with the matrices that a step is for pruned; `name` is the step's. Raises as `Step.run`."""
    pattern = read_pattern(step.pattern, step.sparsity)
    names = find_prunable(model, step.targets, pattern)
    note_dequantized(context, model, names, name)
    return walk(model, context, _Visitor(step, name, pattern, model, context), names=names)


class _Visitor(GramVisitor):
    def __init__(
        self, step: OutputPruning, name: str, pattern: Pattern, model: WorkingModel, context: Context
    ) -> None:
        super().__init__()
        self._step = step
        self._step_name = name
        self._pattern = pattern
        self._model = model
        self._context = context

    @property
    def key(self) -> str:
        return repr(self._step)

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        gram = self.take().matrix(station.names[0])
        prune = self._step.pruner(gram, self._pattern, station.names[0])
        changed: dict[str, StoredTensor] = {}
        for name, weights in station.values.items():
            pruned = prune(weights)
            error = relative_output_error(weights, pruned, gram)
            self._context.layers.append(LayerError(name, self._step_name, error, "outputs"))
            changed[name] = write_matrix(self._model.tensors[name], pruned.numpy())
        return changed
