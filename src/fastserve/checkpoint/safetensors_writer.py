"""Writes safetensors files, some rows at a time, so that memory stays small. Format: huggingface/safetensors,
README."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.rounding import row_pieces
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat

_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "U16": 2, "U32": 4, "I32": 4, "I64": 8}


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A tensor to write: its element type as the format names it, and its consecutive bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[NDArray[Any]]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ELEMENT_BYTES[self.dtype]


def floats(tensor: StoredTensor, stored_format: TensorFormat) -> WrittenTensor:
    """A tensor in a format of single numbers: as it is where it has that format, else rounded."""

    def pieces() -> Iterable[NDArray[np.uint8]]:
        if not tensor.shape:
            yield _in_format(tensor, stored_format)
            return
        for begin, end in row_pieces(tensor.shape):
            yield _in_format(tensor.rows(begin, end), stored_format)

    return WrittenTensor(tensor.name, stored_format.name, tensor.shape, pieces)


def _in_format(tensor: StoredTensor, stored_format: TensorFormat) -> NDArray[np.uint8]:
    if tensor.format is stored_format:
        return tensor.data
    return to_float_format(to_f32(tensor), stored_format)


def write_safetensors(
    path: Path, tensors: Sequence[WrittenTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors in their order; `metadata` is kept in the header.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            start = file.tell()
            for piece in tensor.pieces():
                file.write(np.ascontiguousarray(piece).data)
            assert file.tell() - start == tensor.num_bytes, f"{tensor.name} was written short"
