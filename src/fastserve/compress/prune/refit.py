"""What stays makes up for what goes: the columns that are left of a matrix are fitted anew, by least squares
on calibration rows."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.calibration import walk
from fastserve.compress.prune.cut import Indices, spread_units
from fastserve.compress.prune.matrix import write_matrix
from fastserve.compress.prune.structure import Part
from fastserve.compress.quantize.gram import GramVisitor, relative_output_error
from fastserve.compress.station import Station
from fastserve.compress.step import Context, LayerError, WorkingModel

_DAMPING = 0.01  # of the mean of the diagonal, as SparseGPT's


def refit(
    model: WorkingModel, context: Context, parts: Seq[Part], kept: Mapping[str, Indices]
) -> WorkingModel:
    """The model with the columns of units that go set to 0, the others fitted to give the same outputs, layer
    by layer: later ones see what earlier ones have lost. Raises as `fastserve.compress.calibration.walk`."""
    by_name = {part.name: part for part in parts}
    return walk(model, context, _Refitter(model, context, by_name, kept), names=by_name)


class _Refitter(GramVisitor):
    def __init__(
        self,
        model: WorkingModel,
        context: Context,
        parts: Mapping[str, Part],
        kept: Mapping[str, Indices],
    ) -> None:
        super().__init__()
        self._model = model
        self._context = context
        self._parts = parts
        self._kept = kept
        self._sum = torch.zeros(())

    @property
    def key(self) -> str:
        return f"refit {sorted((name, kept.tolist()) for name, kept in self._kept.items())}"

    def observe(self, station: Station, x: torch.Tensor) -> None:
        super().observe(station, x)
        self._sum = self._sum + x.sum(dim=0, dtype=torch.float64)

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        taken = self.take()
        gram, mean = taken.matrix(station.names[0]), self._sum / taken.num_rows
        self._sum = torch.zeros(())
        ((name, before),) = station.values.items()
        part = self._parts[name]
        kept = torch.from_numpy(spread_units(self._kept[name], part.width))
        bias = part.reader.bias
        if bias is not None:  # which takes over the mean of what goes
            gram = gram - torch.outer(mean, mean)
        after = fit_columns(before, gram, kept)
        changed = {name: write_matrix(self._model.tensors[name], after.numpy())}
        if bias is not None:
            (bias_name,) = bias.names
            old = to_f32(self._model.tensors[bias_name])
            changed[bias_name] = write_matrix(
                self._model.tensors[bias_name], old + ((before - after) @ mean.float()).numpy()
            )
        error = relative_output_error(before, after, gram)
        self._context.layers.append(LayerError(name, "structured", error, "outputs"))
        return changed


def fit_columns(weights: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """W' [out, in], 0 but for the columns `kept`, that minimizes ||x @ W.T - x @ W'.T||, a little damped.

    Args:
        gram: x.T @ x [in, in].
    """
    gone = torch.ones(weights.shape[1], dtype=torch.bool)
    gone[kept] = False
    normal = gram[kept][:, kept].double()
    normal.diagonal().add_(_DAMPING * normal.diagonal().mean() + torch.finfo(torch.float32).tiny)
    mixed = weights[:, gone].double() @ gram[gone][:, kept].double()  # [out, kept]
    fitted = torch.zeros_like(weights)
    fitted[:, kept] = weights[:, kept] + torch.linalg.solve(normal, mixed.T).T.float()
    return fitted
