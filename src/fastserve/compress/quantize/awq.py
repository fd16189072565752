"""The step `awq` (Lin et al., arXiv 2306.00978): columns that meet large activations are multiplied before
they are rounded, and what makes those activations divided, by scales that cost the station's outputs least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.calibration import graph_of, visit
from fastserve.compress.quantize.fold import (
    Factors,
    Fold,
    find_fold,
    float_tensor,
    fold_vectors,
    with_short_vectors,
)
from fastserve.compress.quantize.gram import GramVisitor, output_error, relative_output_error
from fastserve.compress.quantize.grid import Grid, Loss, find_scales, grouped
from fastserve.compress.quantize.step import find_quantizable, note_little_text, read_matrix, round_matrices
from fastserve.compress.station import Station, find_stations
from fastserve.compress.step import Context, LayerError, Need, Targets, WorkingModel
from fastserve.option import check_integer

_LEAST_SCALE = 1e-4
_MOST_ROWS, _FEW = 512, 5  # exponents are judged on some rows of a matrix, with every so manyth shrink
_MOST_COLUMNS, _COARSE = 256, 3  # of a group for which all shrinks are tried; of more, every third
_SCALES, _QUANTIZED = "awq scales of", "awq of"  # names of findings: with the name of a matrix behind


@dataclass(frozen=True, kw_only=True)
class Awq(Grid):
    """The step `awq`. Scales go into the norm before a station, into the values before attention's output, or
    into the up projection before the down projection; where nothing takes them, weights are clipped alone.

    Attributes:
        scale_search: clip weights where that costs the outputs less, too.
        num_exponents: that are tried of the mean magnitudes of activations, from 0 to 1.
        targets: which matrices.
    """

    num_exponents: int = 20
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_exponents", self.num_exponents, low=2, high=100)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        find_quantizable(self, model, self.targets, context)

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        names = find_quantizable(self, model, self.targets, context)
        note_little_text(model, names, context)
        model = with_short_vectors(model)
        visitor = _Awq(self, model, frozenset(names), context)
        found = visit(model, context, visitor, names=names)
        scaled = _assemble(model, visitor, found)
        looked_up = [name for name in names if not isinstance(scaled.tensors[name], GroupedTensor)]
        return round_matrices(scaled, dict.fromkeys(looked_up, self), context, step="awq")


class _Awq(GramVisitor):
    """Visits the stations of a walk that changes nothing: all it finds is for afterwards."""

    def __init__(self, step: Awq, model: WorkingModel, names: frozenset[str], context: Context) -> None:
        super().__init__()
        self._step = step
        self._model = model
        self.names = names
        self._context = context

    @property
    def key(self) -> str:
        return f"awq {self._step}"

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        taken = self.take()
        magnitude, gram = taken.mean_magnitude, taken.matrix(station.names[0]).float()
        found: dict[str, StoredTensor] = {}
        of_columns = torch.ones(len(gram))
        fold = self.fold_of(station)
        if fold is not None:
            scales = self._search(station, fold, magnitude, gram)
            name = f"{_SCALES} {station.names[0]}"
            found[name] = float_tensor(name, scales)
            of_columns = fold.spread(fold_vectors(self._model, fold, scales)[1])
        scaled_gram = gram / of_columns / of_columns[:, None]
        for name, values in station.values.items():
            scaled = values * of_columns
            quantized = self._quantize(name, scaled, scaled_gram)
            found[f"{_QUANTIZED} {name}"] = quantized
            error = relative_output_error(scaled, torch.from_numpy(to_f32(quantized)), scaled_gram)
            self._context.layers.append(LayerError(name, "awq", error, "outputs"))
        return found

    def fold_of(self, station: Station) -> Fold | None:
        """Where a station's scales go, unless a matrix that they are for is quantized already."""
        fold = find_fold(station)
        if fold is None:
            return None
        touched = {name for node in (*station.consumers, fold.maker) for name in node.parameters()[0].names}
        others = (self._model.tensors[name] for name in touched - self.names)
        return None if any(isinstance(tensor, GroupedTensor) for tensor in others) else fold

    def _search(
        self, station: Station, fold: Fold, magnitude: torch.Tensor, gram: torch.Tensor
    ) -> torch.Tensor:
        """The powers of activations' mean magnitudes [in] that cost the outputs least: [num_scales]."""
        base = fold.shared(magnitude).clamp(min=_LEAST_SCALE)
        some = {name: values[:: len(values) // _MOST_ROWS + 1] for name, values in station.values.items()}
        best, least = torch.ones_like(base), torch.inf
        for exponent in torch.linspace(0, 1, self._step.num_exponents).tolist():
            scales = base**exponent
            scales /= (scales.max() * scales.min()).sqrt()
            of_columns = fold.spread(scales)
            cost = sum(
                output_error(self._nearest(name, values * of_columns) / of_columns - values, gram)
                for name, values in some.items()
            )
            if cost < least:
                best, least = scales, cost
        return best

    def _nearest(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """A matrix [out, in] rounded to nearest on the grid, clipped where that makes the error smaller."""
        columns = self._step.columns_of(name, tuple(values.shape))
        shrinks = self._step.shrinks[::_FEW]
        return find_scales(values, self._step, columns, shrinks=shrinks).round(values)

    def _quantize(self, name: str, values: torch.Tensor, gram: torch.Tensor) -> GroupedTensor:
        columns = self._step.columns_of(name, tuple(values.shape))
        if self._step.granularity == "tensor":
            return find_scales(values, self._step, columns).quantize(name, values)
        loss = _loss_of_outputs(gram, columns)
        shrinks = self._step.shrinks[:: 1 if columns <= _MOST_COLUMNS else _COARSE]
        return find_scales(values, self._step, columns, loss=loss, shrinks=shrinks).quantize(name, values)


def _loss_of_outputs(gram: torch.Tensor, columns: int) -> Loss:
    """What the errors of a group of columns cost the outputs, those of other groups left out."""
    blocks = torch.stack([gram[i : i + columns, i : i + columns] for i in range(0, len(gram), columns)])

    def loss(errors: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        by_group = errors.transpose(0, 1)  # [groups, rows, columns]
        return (by_group @ blocks * by_group).sum(2).T

    return loss


def _assemble(model: WorkingModel, visitor: _Awq, found: Mapping[str, StoredTensor]) -> WorkingModel:
    """The model with all that was found: vectors that took scales, and matrices as they were quantized."""
    changed: dict[str, StoredTensor] = {}
    factors = Factors()
    for station in find_stations(graph_of(model), visitor.names):
        fold = visitor.fold_of(station)
        if fold is not None:
            scales = torch.from_numpy(to_f32(found[f"{_SCALES} {station.names[0]}"]))
            vectors, scales = fold_vectors(model, fold, scales)
            changed |= vectors
            factors.add(station, fold, scales)
    quantized = {name: found.get(f"{_QUANTIZED} {name}") for name in visitor.names | factors.names}
    for name, tensor in quantized.items():
        if isinstance(tensor, GroupedTensor):
            changed[name] = _multiply_rows(tensor, name, factors.rows.get(name))
        elif name in factors.names:
            changed[name] = float_tensor(name, factors.apply(name, read_matrix(model, name)))
    return model.with_tensors(changed, int8_activations=model.int8_activations - visitor.names)


def _multiply_rows(tensor: GroupedTensor, name: str, factors: torch.Tensor | None) -> GroupedTensor:
    """A quantized matrix under its own name, its rows multiplied: its scales are."""
    codes, zeros, scales = tensor.groups(0, tensor.shape[0])
    if factors is not None:
        products = to_float_format(scales * factors.numpy()[:, None], tensor.format)
        scales = to_f32(StoredTensor("", tensor.format, scales.shape, products))
    size, stored_format = tensor.group_size, tensor.format
    return grouped(name, codes, scales, zeros, bits=tensor.bits, group_size=size, scale_format=stored_format)
