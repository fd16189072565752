"""The steps `rtn` and `gptq`: matrices rounded to nearest, or column by column with errors made up for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.compress.calibration import walk
from fastserve.compress.quantize.gptq import Solver
from fastserve.compress.quantize.gram import GramVisitor, relative_output_error
from fastserve.compress.quantize.grid import Grid, quantize
from fastserve.compress.station import Station
from fastserve.compress.step import Context, LayerError, Need, Targets, WorkingModel
from fastserve.errors import CheckpointError
from fastserve.option import check_number


@dataclass(frozen=True, kw_only=True)
class Rtn(Grid):
    """The step `rtn`: each matrix rounded to nearest, its scales searched. Needs no calibration.

    Attributes:
        targets: which matrices.

    >>> Rtn(bits=8).needs
    frozenset()
    """

    targets: Targets = field(default_factory=Targets)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        find_quantizable(self, model, self.targets, context)

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        names = find_quantizable(self, model, self.targets, context)
        return round_matrices(model, dict.fromkeys(names, self), context, step="rtn")


@dataclass(frozen=True, kw_only=True)
class Gptq(Grid):
    """The step `gptq`: columns of a matrix are rounded one by one, and those that are left make up for the
    error on the calibration text (arXiv 2210.17323). Each matrix meets what those before it give once they
    are quantized. A table of embeddings that is not the head too is rounded to nearest.

    Attributes:
        damping: share of the mean of squared activations that is added to each, against too little text.
        act_order: columns with large activations first; groups remain of neighbouring columns.
        targets: which matrices.
    """

    damping: float = 0.01
    act_order: bool = True
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("damping", self.damping, 0.0, 1.0)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def check(self, model: WorkingModel, context: Context) -> None:
        """Raises as `Step.check`."""
        find_quantizable(self, model, self.targets, context)

    def run(self, model: WorkingModel, context: Context) -> WorkingModel:
        """Raises as `Step.run`."""
        names = find_quantizable(self, model, self.targets, context)
        solver = Solver(damping=self.damping, act_order=self.act_order)
        return solve_matrices(model, dict.fromkeys(names, self), solver, context)


def find_quantizable(grid: Grid, model: WorkingModel, targets: Targets, context: Context) -> tuple[str, ...]:
    """Names of the matrices that are to be quantized, in the order of the checkpoint; what is done otherwise
    than asked is noted.

    Raises:
        OptionError: there is none, or one cannot be quantized as asked.
    """
    names = model.matrices(targets)
    shapes = {name: model.tensors[name].shape for name in names}
    by_rows = [
        name for name in names if grid.has_groups and grid.columns_of(name, shapes[name]) != grid.group_size
    ]
    if by_rows:
        context.notes.append(
            f"{len(by_rows)} matrices have a scale for each row, as they have no groups of {grid.group_size}"
            f" columns: {by_rows[0]} {list(shapes[by_rows[0]])}, ..."
        )
    if grid.bits == 8 and not grid.symmetric:
        context.notes.append("the native runtime computes with int8 that has zero points as with floats")
    return names


def round_matrices(
    model: WorkingModel, grids: Mapping[str, Grid], context: Context, *, step: str
) -> WorkingModel:
    """The model with matrices rounded to nearest, each on its grid. `step` is whose work it is.

    Raises:
        OptionError: a matrix cannot be quantized so.
        CheckpointError: it is not finite.
    """
    changed: dict[str, StoredTensor] = {}
    for done, (name, grid) in enumerate(grids.items()):
        context.progress(step, done, len(grids))
        values = read_matrix(model, name)
        changed[name] = quantize(name, values, grid)
        error = weight_error(values, torch.from_numpy(to_f32(changed[name])))
        context.layers.append(LayerError(name, step, error, "weights"))
    context.progress(step, len(grids), len(grids))
    return model.with_tensors(changed, int8_activations=model.int8_activations - changed.keys())


def solve_matrices(
    model: WorkingModel, grids: Mapping[str, Grid], solver: Solver, context: Context
) -> WorkingModel:
    """The model with matrices quantized by GPTQ, each on its grid. A table that is only looked up is rounded
    to nearest."""
    visitor = _Gptq(solver, grids, context)
    note_little_text(model, grids.keys(), context)
    walked = walk(model, context, visitor, names=grids.keys())
    walked = walked.with_tensors({}, int8_activations=model.int8_activations - grids.keys())
    looked_up = {
        name: grid for name, grid in grids.items() if not isinstance(walked.tensors[name], GroupedTensor)
    }
    return round_matrices(walked, looked_up, context, step="gptq")


def note_little_text(model: WorkingModel, names: Collection[str], context: Context) -> None:
    """Note where there are fewer calibration tokens than columns, which then are not told apart by them."""
    num_tokens = sum(map(len, context.calibration))
    widest = max(names, key=lambda name: model.tensors[name].shape[1])
    columns = model.tensors[widest].shape[1]
    if num_tokens < columns:
        context.notes.append(
            f"calibrated on {num_tokens} tokens, fewer than the {columns} columns of {widest}"
        )


def read_matrix(model: WorkingModel, name: str) -> torch.Tensor:
    """A matrix [out, in] in float32.

    Raises:
        CheckpointError: it is not finite.
    """
    values = torch.from_numpy(to_f32(model.tensors[name]))
    if not torch.isfinite(values).all():
        raise CheckpointError(
            f"{name} has numbers that are NaN or infinite", hint="take the model from its source again"
        )
    return values


def weight_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """Squared norm of the change of a matrix over its own."""
    whole = float(before.square().sum())
    return float((after - before).square().sum()) / whole if whole > 0 else 0.0


class _Gptq(GramVisitor):
    """Visits the stations of a walk."""

    def __init__(self, solver: Solver, grids: Mapping[str, Grid], context: Context) -> None:
        super().__init__()
        self._solver = solver
        self._grids = grids
        self._context = context

    @property
    def key(self) -> str:
        return f"gptq {self._solver} {sorted(self._grids.items(), key=lambda item: item[0])}"

    def finish(self, station: Station) -> Mapping[str, StoredTensor]:
        gram = self.take().matrix(station.names[0])
        plan = self._solver.plan(gram, station.names[0])
        found: dict[str, StoredTensor] = {}
        for name, values in station.values.items():
            found[name] = plan.quantize(name, values, self._grids[name])
            error = relative_output_error(values, torch.from_numpy(to_f32(found[name])), gram)
            self._context.layers.append(LayerError(name, "gptq", error, "outputs"))
        return found
