"""Tensors as a graph wants them where a checkpoint has them otherwise: views, which copy when read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.tensor import StoredTensor
from fastserve.errors import CheckpointError, UnsupportedError

Change = Callable[[StoredTensor], StoredTensor]


class Arranged(Mapping[str, StoredTensor]):
    """Tensors under the names that they have, some of them changed.

    >>> whole = np.arange(4, dtype=np.uint8)
    >>> from fastserve.checkpoint.tensor import TensorFormat
    >>> tensors = {"a": StoredTensor("a", TensorFormat.BF16, (2, 1), whole)}
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


class _View(StoredTensor):
    """A tensor whose bytes are made from those of another one each time that they are asked for."""

    __slots__ = ("_make", "_source")
    _source: StoredTensor
    _make: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

    def __init__(
        self,
        source: StoredTensor,
        shape: tuple[int, ...],
        make: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    ) -> None:
        for name, value in (("name", source.name), ("format", source.format), ("shape", shape)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_make", make)

    @property
    def data(self) -> NDArray[np.uint8]:
        return self._make(self._source.data)


class _Transposed(_View):
    __slots__ = ()


def transposed(tensor: StoredTensor) -> StoredTensor:
    """A matrix [columns, rows] as [rows, columns].

    Raises:
        UnsupportedError: it is stored in blocks of several columns.
        CheckpointError: it is no matrix.
    """
    if isinstance(tensor, _Transposed):
        return tensor._source
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{tensor.name} has shape {list(tensor.shape)}, a matrix was expected")
    if tensor.format.block_elements > 1:
        raise UnsupportedError(
            f"{tensor.name} is stored as {tensor.format.value} and transposed: blocks cannot be turned",
            hint="take the model in float16, bfloat16 or float32, or as GGUF",
        )
    return _transposed(tensor)


def transposed_back(tensor: StoredTensor) -> StoredTensor:
    """A matrix [rows, columns] in the shape [columns, rows] that its name has elsewhere, for `transposed` to
    give back. Where it is stored in blocks, its bytes can be read there only."""
    return _transposed(tensor)


def _transposed(tensor: StoredTensor) -> StoredTensor:
    element_bytes = tensor.format.block_bytes

    def make(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if tensor.format.block_elements > 1:
            raise UnsupportedError(f"{tensor.name} is stored as {tensor.format.value},  cannot be turned")
        elements = data.reshape(*tensor.shape, element_bytes)
        return np.ascontiguousarray(elements.swapaxes(0, 1)).reshape(-1)

    return _Transposed(tensor, tensor.shape[::-1], make)


def rows_regrouped(tensor: StoredTensor, shape: Sequence[int], axes: Sequence[int]) -> StoredTensor:
    """Rows that are numbered by several indices, of which there are `shape`, in another order of these: what
    was index `axes[0]` changes slowest. Rows are whole blocks, so any format will do.

    Raises:
        CheckpointError: there are not so many rows.
    """
    rows = tensor.shape[0] if tensor.shape else 1
    if rows != math.prod(shape):
        raise CheckpointError(f"{tensor.name} has {rows} rows, {math.prod(shape)} were expected")
    order = np.arange(rows).reshape(shape).transpose(axes).reshape(rows)

    def make(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return data.reshape(rows, -1)[order].reshape(-1)

    return _View(tensor, tensor.shape, make)


def shifted(tensor: StoredTensor, offset: float) -> StoredTensor:
    """Float32 numbers with `offset` added to each.

    Raises:
        UnsupportedError: they are stored otherwise.
    """
    if tensor.format.value != "f32":
        raise UnsupportedError(f"{tensor.name} is stored as {tensor.format.value}, f32 was expected")

    def make(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return (data.view("<f4") + np.float32(offset)).view(np.uint8)

    return _View(tensor, tensor.shape, make)
