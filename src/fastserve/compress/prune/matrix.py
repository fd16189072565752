"""Matrices of a working model as numbers, and back in the format that they were stored in."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.compress.prune.pattern import Pattern
from fastserve.compress.step import Context, LayerError, Targets, WorkingModel
from fastserve.errors import CheckpointError
from fastserve.types import Float32Array


def read_matrix(tensor: StoredTensor) -> Float32Array:
    """Its values, a fresh array.

    Raises:
        CheckpointError: some are not finite.
    """
    values = to_f32(tensor)
    if not np.isfinite(values).all():
        number = int((~np.isfinite(values)).sum())
        raise CheckpointError(
            f"{tensor.name} {list(tensor.shape)} has {number} weights that are not finite",
            hint="take the model from its source again",
        )
    return values


def find_prunable(model: WorkingModel, targets: Targets, pattern: Pattern) -> tuple[str, ...]:
    """Names of the matrices that are to be pruned, in the order of the checkpoint.

    Raises:
        OptionError: there is none, or one does not part into groups or blocks.
    """
    names = model.matrices(targets)
    for name in names:
        pattern.check(name, model.tensors[name].shape)
    return names


def note_dequantized(context: Context, model: WorkingModel, names: Iterable[str], step: str) -> None:
    """Tell the report that matrices which came as whole numbers go on as floats."""
    if found := [name for name in names if isinstance(model.tensors[name], GroupedTensor)]:
        context.notes.append(
            f"{step}: {len(found)} quantized matrices were dequantized to be pruned ({found[0]}, ...);"
            " quantize after pruning"
        )


def write_matrix(tensor: StoredTensor, values: Float32Array) -> StoredTensor:
    """`values` in place of a tensor's: in its format where that holds single numbers, else as float32."""
    is_float = tensor.format.block_elements == 1 and not isinstance(tensor, GroupedTensor)
    stored = tensor.format if is_float else TensorFormat.F32
    return stored_tensor(tensor.name, values, stored)


def stored_tensor(
    name: str, values: Float32Array, stored_format: TensorFormat = TensorFormat.F32
) -> StoredTensor:
    """Values as a tensor in memory, rounded to nearest."""
    data = to_float_format(np.ascontiguousarray(values), stored_format)
    return StoredTensor(name, stored_format, values.shape, data.reshape(-1).view(np.uint8))


def relative_change(before: Float32Array, after: Float32Array) -> float:
    """Squared norm of the difference over that of `before`; 0 where both are 0."""
    whole = float(np.square(before, dtype=np.float64).sum())
    return float(np.square(before - after, dtype=np.float64).sum()) / whole if whole else 0.0


def note_weights(context: Context, name: str, step: str, before: Float32Array, after: Float32Array) -> None:
    """Tell the report how much of a matrix a step has taken."""
    context.layers.append(LayerError(name, step, relative_change(before, after), "weights"))
