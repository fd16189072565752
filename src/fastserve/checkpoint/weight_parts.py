"""The parts of one quantized weight among those of a checkpoint: `module.part`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fastserve.checkpoint.safetensors import IntegerTensor, Part
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.errors import CheckpointError


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

    def contradict(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: of {self.module}, {problem}", hint="download the model again, config and weights"
        )
