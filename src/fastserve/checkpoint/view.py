"""Tensors as a graph wants them where a checkpoint has them otherwise: views, which copy when read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups
from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, UnsupportedError

Change = Callable[[StoredTensor], StoredTensor]


class Arranged(Mapping[str, StoredTensor]):
    """Tensors under the names that they have, some of them changed.

    >>> from fastserve.checkpoint.tensor import TensorFormat
    >>> tensors = {"a": StoredTensor("a", TensorFormat.BF16, (2, 1), np.arange(4, dtype=np.uint8))}
    >>> Arranged(tensors, {"a": transposed})["a"].shape
    (1, 2)
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], changes: Mapping[str, Change]) -> None:
        self._tensors = tensors
        # Made at once, so that what cannot be arranged is refused when a model is opened.
        self._changed = {name: change(tensors[name]) for name, change in changes.items()}

    def __getitem__(self, name: str) -> StoredTensor:
        changed = self._changed.get(name)
        return self._tensors[name] if changed is None else changed

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Transposed(ComputedTensor):
    """A matrix of single elements, transposed."""

    __slots__ = ("source",)
    source: StoredTensor

    def __init__(self, source: StoredTensor) -> None:
        super().__init__(source.name, source.format, source.shape[::-1], self._columns)
        object.__setattr__(self, "source", source)

    def _columns(self, begin: int, end: int) -> NDArray[np.uint8]:
        source = self.source
        _check_transposable(source)
        elements = source.data.reshape(*source.shape, source.format.block_bytes)
        return np.ascontiguousarray(elements[:, begin:end].swapaxes(0, 1)).reshape(-1)


def transposed(tensor: StoredTensor) -> StoredTensor:
    """A matrix [columns, rows] as [rows, columns]. Whole numbers with scales become the numbers that they
    stand for.

    Raises:
        UnsupportedError: it is stored in blocks of columns.
        CheckpointError: it is no matrix.
    """
    if isinstance(tensor, _Transposed):
        return tensor.source
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{tensor.name} has shape {list(tensor.shape)}, a matrix was expected")
    _check_transposable(tensor)
    return _Transposed(tensor)


def transposed_back(tensor: StoredTensor) -> StoredTensor:
    """A matrix [rows, columns] in the shape [columns, rows] that its name has elsewhere, for `transposed` to
    give back. Where it is stored in blocks, its bytes can be read there only."""
    return _Transposed(tensor) if len(tensor.shape) == 2 else tensor


def rows_regrouped(tensor: StoredTensor, shape: Sequence[int], axes: Sequence[int]) -> StoredTensor:
    """Rows that are numbered by several indices, of which there are `shape`, in another order of these: that
    of `axes[0]` changes slowest. Rows are whole blocks and groups, so any format will do.

    Raises:
        CheckpointError: there are not so many rows.
    """
    num_rows = tensor.shape[0] if tensor.shape else 1
    if num_rows != math.prod(shape):
        raise CheckpointError(f"{tensor.name} has {num_rows} rows, {math.prod(shape)} were expected")
    return rows_in_order(tensor, np.arange(num_rows).reshape(shape).transpose(axes).reshape(num_rows))


def rows_in_order(tensor: StoredTensor, order: NDArray[np.int64]) -> StoredTensor:
    """The rows of a tensor whose indices are these, in their order. In any format, as `rows_regrouped`."""
    if isinstance(tensor, GroupedTensor):
        return _grouped_rows(tensor, order)
    return ComputedTensor(
        tensor.name,
        tensor.format,
        (len(order), *tensor.shape[1:]),
        lambda begin, end: np.concatenate([tensor.rows(*run).data for run in _runs(order[begin:end])]),
    )


def shifted(tensor: StoredTensor, offset: float) -> StoredTensor:
    """Float32 numbers with `offset` added to each.

    Raises:
        UnsupportedError: they are stored otherwise.
    """
    if tensor.format is not TensorFormat.F32:
        raise UnsupportedError(f"{tensor.name} is stored as {tensor.format.value}, f32 was expected")
    return ComputedTensor(
        tensor.name,
        tensor.format,
        tensor.shape,
        lambda begin, end: (tensor.rows(begin, end).data.view("<f4") + np.float32(offset)).view(np.uint8),
    )


def _grouped_rows(tensor: GroupedTensor, order: NDArray[np.int64]) -> GroupedTensor:
    def read(begin: int, end: int) -> Groups:
        parts = [tensor.groups(*run) for run in _runs(order[begin:end])]
        width = tensor.groups(0, 1).scales.shape[1]
        zeros = [
            np.zeros((len(part.scales), width), np.int8) if part.zeros is None else part.zeros
            for part in parts
        ]
        return Groups(
            np.concatenate([part.codes for part in parts]),
            np.concatenate(zeros),
            np.concatenate([part.scales for part in parts]),
        )

    return GroupedTensor(
        tensor.name,
        tensor.format,
        (len(order), tensor.shape[1]),
        read,
        lambda: np.ones(1, np.int8) if tensor.has_zeros() else None,
        bits=tensor.bits,
        group_size=tensor.group_size,
        group_of_column=tensor.group_of_column,
    )


def _runs(order: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Rows in this order, as begin and end of those that lie one after the other."""
    ends = np.flatnonzero(np.diff(order) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(order, ends)]


def _check_transposable(tensor: StoredTensor) -> None:
    if tensor.format.block_elements > 1:
        raise UnsupportedError(
            f"{tensor.name} is stored as {tensor.format.value} and transposed: its blocks cannot be turned",
            hint="take the model in float16, bfloat16 or float32",
        )
