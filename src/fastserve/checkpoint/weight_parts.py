"""The parts of one quantized weight among those of a checkpoint: `module.part`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.safetensors import IntegerTensor, Part
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import Float32Array

UNQUANTIZED = "take the model in one of these, or unquantized: weights are rounded when it is loaded"


class WeightParts:
    """The parts of one module's weight, taken out of those of the checkpoint one by one."""

    def __init__(self, folder: Path, module: str, left: dict[str, Part]) -> None:
        self.folder = folder
        self.module = module
        self._left = left

    def integers(self, part: str, *dtypes: str) -> NDArray[Any]:
        """A part of whole numbers, of one of these element types."""
        found = self._left.pop(f"{self.module}.{part}", None)
        if not isinstance(found, IntegerTensor) or found.dtype not in dtypes:
            what = (
                "missing"
                if found is None
                else "of floats"
                if isinstance(found, StoredTensor)
                else found.dtype
            )
            raise self.contradict(f"{part} is {what}, {' or '.join(dtypes)} was expected")
        return found.values

    def optional_integers(self, part: str, *dtypes: str) -> NDArray[Any] | None:
        return self.integers(part, *dtypes) if f"{self.module}.{part}" in self._left else None

    def floats(self, part: str) -> StoredTensor:
        found = self._left.pop(f"{self.module}.{part}", None)
        if not isinstance(found, StoredTensor):
            raise self.contradict(
                f"{part} is {'missing' if found is None else found.dtype}, floats were expected"
            )
        return found

    def peek(self, part: str) -> Part | None:
        return self._left.get(f"{self.module}.{part}")

    def any(self, part: str) -> Part | None:
        return self._left.pop(f"{self.module}.{part}", None)

    def packed_transposed(self) -> tuple[NDArray[np.int32], NDArray[np.int32], StoredTensor]:
        """`qweight`, `qzeros` and `scales` [groups, outputs], as GPTQ and AWQ have them."""
        packed, zeros = self.integers("qweight", "I32"), self.integers("qzeros", "I32")
        scales = self.floats("scales")
        if not packed.ndim == zeros.ndim == len(scales.shape) == 2 or not packed.size or not zeros.size:
            raise self.contradict_shapes(packed, zeros, scales)
        return packed, zeros, scales

    def contradict_shapes(self, *parts: NDArray[Any] | StoredTensor) -> CheckpointError:
        return self.contradict(
            f"shapes contradict each other: {', '.join(str(list(p.shape)) for p in parts)}"
        )

    def refuse(self, what: str, supported: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.folder}: {self.module} has {what}, supported are {supported}", hint=UNQUANTIZED
        )

    def contradict(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: of {self.module}, {problem}", hint="download the model again, config and weights"
        )

    def group_size(self, depth: int, num_groups: int) -> int:
        """Columns of a group, where so many groups are of neighbouring columns."""
        size = -(-depth // max(num_groups, 1))
        if not num_groups or -(-depth // max(size, 1)) != num_groups:
            raise self.contradict(f"{depth} columns do not part into {num_groups} groups")
        return size

    def group_of_column(self, part: str, depth: int, num_groups: int) -> NDArray[np.int32] | None:
        """The part that has the group of each column; None where it is missing, or was never filled."""
        groups = self.optional_integers(part, "I32", "I64")
        if groups is None or (groups.size and groups.min() < 0):
            return None
        if groups.shape != (depth,) or groups.max(initial=0) >= num_groups:
            raise self.contradict(
                f"{part} is {list(groups.shape)} up to {groups.max(initial=0)}, for {depth} columns in"
                f" {num_groups} groups"
            )
        return groups.astype(np.int32)


def float_columns(tensor: StoredTensor, begin: int, end: int) -> Float32Array:
    """Columns `begin` up to `end` of a matrix of floats."""
    rows, columns = tensor.shape
    data = tensor.data.reshape(rows, columns, -1)[:, begin:end].reshape(-1)
    return to_f32(StoredTensor(tensor.name, tensor.format, (rows, end - begin), data))
