"""What becomes of a model's tensors when it is written in another format, told in lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat

Target = Literal["safetensors", "compressed-tensors", "gguf"]
ConvertedWeights = Literal[
    "auto", "f32", "f16", "bf16", "int8", "int8:g32", "w8a8", "int4", "int4:g32", "int4:g128"
]

FLOATS = {"f32": TensorFormat.F32, "f16": TensorFormat.F16, "bf16": TensorFormat.BF16}


@dataclass(frozen=True, slots=True)
class Matrices:
    """The matrices of a model that may become whole numbers.

    Attributes:
        linears: that are multiplied with, but for the head.
        tables: embeddings of tokens, and the head.
        experts: that are multiplied with what a gate gives them.
        rearranged: linears that are stored in another order than they are multiplied in: as [in, out], or
            head by head.
        float_activations: linears that are no W8A8: as int8 they meet activations as they are.
    """

    linears: Collection[str] = ()
    tables: Collection[str] = ()
    experts: Collection[str] = ()
    rearranged: Collection[str] = ()
    float_activations: Collection[str] = ()


@dataclass(slots=True)
class Conversion:
    """What was done to how many tensors: lines for a person, and the sizes."""

    output: Path
    target: Target
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (what was done, for what reason)
    num_bytes: int = 0
    remarks: list[str] = field(default_factory=list)  # about the whole model

    def note(self, what: str, why: str = "") -> None:
        self.changes[what, why] += 1

    @property
    def lines(self) -> list[str]:
        """One for each thing that was done, the most frequent first."""
        return [
            f"{count} {'tensor' if count == 1 else 'tensors'} {what}{f': {why}' if why else ''}"
            for (what, why), count in self.changes.most_common()
        ] + self.remarks

    def note_floats(self, tensor: StoredTensor, stored_format: TensorFormat) -> None:
        """Of a tensor that is written as plain numbers."""
        name = describe(tensor)
        if is_float(tensor) and tensor.format is stored_format:
            self.note(f"kept as {stored_format.value}")
        elif isinstance(tensor, GroupedTensor) and stored_format in (tensor.format, TensorFormat.F32):
            self.note(f"dequantized from {name} to {stored_format.value}", "as its own library does")
        elif stored_format is TensorFormat.F32:
            self.note(f"written as f32 from {name}", "exactly")
        else:
            self.note(f"rounded to {stored_format.value} from {name}")


def is_float(tensor: StoredTensor) -> bool:
    return not isinstance(tensor, GroupedTensor) and tensor.format.block_elements == 1


def describe(tensor: StoredTensor) -> str:
    """What a tensor is stored as, for a line."""
    if isinstance(tensor, GroupedTensor):
        groups = "rows" if tensor.group_size >= tensor.shape[1] else f"groups of {tensor.group_size}"
        is_ordered = tensor.group_of_column is not None
        return f"int{tensor.bits} in {groups}{' in an order of their own' if is_ordered else ''}"
    return tensor.format.value
