"""The step `smoothquant` (Xiao et al., arXiv 2211.10438): large activations are divided, and the weights that
they meet multiplied, until both are as hard to round; then both become int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.calibration import graph_of, torch_threads, visit
from fastserve.compress.quantize.fold import (
    Factors,
    Fold,
    find_fold,
    float_tensor,
    fold_vectors,
    with_short_vectors,
)
from fastserve.compress.quantize.grid import Grid
from fastserve.compress.quantize.rounded_inputs import keep_costly, measure_losses
from fastserve.compress.quantize.step import read_matrix, round_matrices
from fastserve.compress.station import Station, find_stations
from fastserve.compress.step import Context, Need, Targets, WorkingModel
from fastserve.graph.node import Linear
from fastserve.option import check_number

_LEAST = 1e-5  # magnitude of activations and weights that scales are made of
_MOST_SEQUENCES = 16  # of calibration, that losses are estimated on


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """The step `smoothquant`: scales go into the norms before linears; then weights are int8 with a scale for
    each row, and meet activations of int8 with a scale for each token (W8A8).

    Attributes:
        alpha: how much of the difficulty goes from activations to weights, from 0 to 1.
        most_loss: what rounding activations may lose in all, estimated on some of the calibration text: in
            nats a token, or for encoders the squared change of embeddings over their own. Matrices whose
            inputs lose most meet them as they are. None: all meet int8.
        targets: which matrices.
    """

    alpha: float = 0.5
    most_loss: float | None = None
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0.0, 1.0)
        if self.most_loss is not None:
            check_number("most_loss", self.most_loss, 0.0, 100.0)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        model.matrices(self.targets)

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        names = model.matrices(self.targets)
        smooth = self.smooth(model, context)
        stations = find_stations(graph_of(smooth), frozenset(names))
        multiplied = frozenset(names) & {name for station in stations for name in station.names}
        rounded_inputs = multiplied - self._kept(smooth, multiplied, context)  # tables are looked up
        grid = Grid(bits=8, granularity="channel")
        rounded = round_matrices(smooth, dict.fromkeys(names, grid), context, step="smoothquant")
        return rounded.with_tensors({}, int8_activations=model.int8_activations | rounded_inputs)

    def _kept(self, smooth: WorkingModel, names: frozenset[str], context: Context) -> frozenset[str]:
        """Names of matrices whose inputs are not rounded."""
        if self.most_loss is None or not names:
            return frozenset()
        sequences = context.calibration[:_MOST_SEQUENCES]
        with torch_threads(context.threads):
            losses = measure_losses(smooth, names, sequences, seed=context.seed, progress=context.progress)
        kept = keep_costly(losses, self.most_loss)
        context.notes.append(
            f"smoothquant: {len(kept.names)} of {len(names)} matrices meet activations as they are: rounding"
            f" the others' loses an estimated {kept.loss:.2g}, all would lose {sum(losses.values()):.2g}"
        )
        return kept.names

    def smooth(self, model: WorkingModel, context: Context) -> WorkingModel:
        """The first half of `run`: the model of the same function, not rounded."""
        names = model.matrices(self.targets)
        model = with_short_vectors(model)
        found = visit(model, context, _Magnitudes(), names=names)
        return self._smooth(model, frozenset(names), found, context)

    def _smooth(
        self,
        model: WorkingModel,
        names: frozenset[str],
        magnitudes: Mapping[str, StoredTensor],
        context: Context,
    ) -> WorkingModel:
        """The model with scales folded: it computes what it did, up to rounding."""
        changed: dict[str, StoredTensor] = {}
        factors = Factors()
        stations, num_smoothed = find_stations(graph_of(model), names), 0
        for station in stations:
            fold = find_fold(station)
            if fold is None or isinstance(fold.maker, Linear) or not _are_floats(model, station):
                continue
            num_smoothed += 1
            activations = torch.from_numpy(to_f32(magnitudes[_key(station)]))
            vectors, scales = fold_vectors(model, fold, self._scales(model, station, fold, activations))
            changed |= vectors
            factors.add(station, fold, scales)
        if num_smoothed < len(stations):
            context.notes.append(
                f"smoothquant: {num_smoothed} of {len(stations)} inputs come from norms that take scales"
            )
        for name in factors.names:
            changed[name] = float_tensor(name, factors.apply(name, read_matrix(model, name)))
        return model.with_tensors(changed)

    def _scales(
        self, model: WorkingModel, station: Station, fold: Fold, activations: torch.Tensor
    ) -> torch.Tensor:
        """max|x|^alpha / max|w|^(1 - alpha) of each column (equation 4 of the paper)."""
        names = (node.weight.names[0] for node in station.consumers if isinstance(node, Linear))
        columns = [read_matrix(model, name).abs().amax(0) for name in names]
        weights = torch.stack(columns).amax(0).clamp(min=_LEAST)
        scales: torch.Tensor = activations.clamp(min=_LEAST) ** self.alpha / weights ** (1 - self.alpha)
        return fold.shared(scales)


class _Magnitudes:
    """Finds the largest magnitude of each column of every station's inputs."""

    key = "largest magnitudes"

    def __init__(self) -> None:
        self._largest: torch.Tensor | None = None

    def observe(self, station: Station, x: torch.Tensor) -> None:
        largest = x.abs().amax(0)
        self._largest = largest if self._largest is None else torch.maximum(largest, self._largest)

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        assert self._largest is not None
        largest, self._largest = self._largest, None
        return {_key(station): float_tensor(_key(station), largest)}


def _key(station: Station) -> str:
    """Of a finding: the name of no tensor."""
    return f"largest inputs of {station.names[0]}"


def _are_floats(model: WorkingModel, station: Station) -> bool:
    names = (name for node in station.consumers for name in node.parameters()[0].names)
    return not any(isinstance(model.tensors[name], GroupedTensor) for name in names)
