"""Writes GGUF files (version 3), some rows at a time, so that memory stays small. Format: ggml-org/ggml,
docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.gguf import FORMATS, SCALAR_DTYPES, GgufValue, StringArray
from fastserve.checkpoint.tensor import TensorFormat

_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_CODES = {stored_format: code for code, stored_format in FORMATS.items()}
_VALUE_CODES = {dtype: code for code, dtype in SCALAR_DTYPES.items()}

WrittenValue = GgufValue | Sequence[str]


@dataclass(frozen=True, slots=True)
class WrittenGgufTensor:
    """A tensor to write, under its GGUF name; `pieces` are its consecutive bytes."""

    name: str
    format: TensorFormat
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[NDArray[np.uint8]]]


def write_gguf(
    path: Path, metadata: Mapping[str, WrittenValue], tensors: Sequence[WrittenGgufTensor]
) -> None:
    """Write metadata and tensors in their order.

    Whole numbers are written as u32 where they fit, arrays by their element type.

    Raises:
        OSError: the file cannot be written.
    """
    pairs = {"general.alignment": _ALIGNMENT, **metadata}
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)))
        for key, value in pairs.items():
            file.write(_pack_text(key))
            for piece in _pack_value(value):
                file.write(piece)
        position = 0
        for tensor in tensors:
            file.write(_pack_text(tensor.name) + struct.pack("<I", len(tensor.shape)))
            file.write(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
            file.write(struct.pack("<IQ", _CODES[tensor.format], position))
            position += _round_up(tensor.format.num_bytes(tensor.shape))
        file.write(bytes(_round_up(file.tell()) - file.tell()))
        for tensor in tensors:
            start = file.tell()
            for array in tensor.pieces():
                file.write(np.ascontiguousarray(array).data)
            num_bytes = file.tell() - start
            assert num_bytes == tensor.format.num_bytes(tensor.shape), f"{tensor.name} was written short"
            file.write(bytes(_round_up(num_bytes) - num_bytes))


def _pack_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pack_value(value: WrittenValue) -> Iterable[bytes]:
    match value:
        case str():
            yield struct.pack("<I", _STRING) + _pack_text(value)
        case bool() | int() | float():
            number = _as_number(value)
            yield struct.pack("<I", _VALUE_CODES[number.dtype]) + number.tobytes()
        case np.ndarray():
            yield struct.pack("<IIQ", _ARRAY, _VALUE_CODES[value.dtype], len(value)) + value.tobytes()
        case StringArray() | Sequence():
            yield struct.pack("<IIQ", _ARRAY, _STRING, len(value))
            for text in value:
                yield _pack_text(text)


def _as_number(value: bool | int | float) -> np.generic[Any]:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return next(
            kind(value) for kind in (np.uint32, np.int32, np.uint64, np.int64) if _fits(value, np.iinfo(kind))
        )
    return np.float32(value) if float(np.float32(value)) == value else _decimal(value)


def _fits(value: int, limits: np.iinfo[Any]) -> bool:
    return bool(limits.min <= value <= limits.max)


def _decimal(value: float) -> np.generic[Any]:
    """float32 where that is the number that was meant: 1e-5 is written shortly and read back as 1e-5."""
    short = np.float32(value)
    return short if float(str(short)) == value else np.float64(value)


def _round_up(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
