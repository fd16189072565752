"""How much each unit of a model's layers adds to their outputs, by calibration."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.calibration import visit
from fastserve.compress.prune.matrix import stored_tensor
from fastserve.compress.prune.structure import Part
from fastserve.compress.quantize.gram import GramVisitor
from fastserve.compress.station import Station
from fastserve.compress.step import Context, WorkingModel
from fastserve.types import Float32Array

Scores = NDArray[np.float64]  # [units]

_MARK = " scores"  # behind a matrix's name: a finding, no tensor of the model


def score_by_activation(model: WorkingModel, context: Context, parts: Seq[Part]) -> dict[str, Scores]:
    """Of each unit the norm of what it adds to the output of its reader, root mean square over calibration
    tokens: ||x[:, u] @ W[:, u].T|| / sqrt(tokens). Of a neuron that is the norm of its activation times that
    of its outgoing weights.

    Returns:
        The scores by the name of each part's reader. Raises as `fastserve.compress.calibration.walk`.
    """
    by_name = {part.name: part for part in parts}
    found = visit(model, context, _Scorer(by_name), names=by_name)
    return {name.removesuffix(_MARK): np.asarray(to_f32(t), np.float64) for name, t in found.items()}


class _Scorer(GramVisitor):
    """Changes nothing: all that it finds is scores."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self._parts = parts

    @property
    def key(self) -> str:
        return f"score units {sorted((name, part.width) for name, part in self._parts.items())}"

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        gram = self.take().matrix(station.names[0]).float()
        ((name, weights),) = station.values.items()
        scores = unit_norms(weights, gram, self._parts[name].width)
        return {f"{name}{_MARK}": stored_tensor(f"{name}{_MARK}", scores)}


def unit_norms(weights: torch.Tensor, gram: torch.Tensor, width: int) -> Float32Array:
    """||x[:, u] @ W[:, u].T|| of each unit u of `width` columns, by the Gram matrix of x [in, in]."""
    units = weights.shape[1] // width
    blocks = weights.reshape(-1, units, width).transpose(0, 1)  # [units, out, width]
    index = torch.arange(units)
    grams = gram.reshape(units, width, units, width)[index, :, index]  # [units, width, width]
    energies = ((blocks @ grams) * blocks).sum(dim=(1, 2), dtype=torch.float64)
    return np.asarray(energies.clamp(min=0).sqrt().float().numpy())
