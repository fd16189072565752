"""Reads safetensors files (format: huggingface/safetensors README) as views of the mapped file.

The header is parsed here and not by the `safetensors` library, because on its numpy side the library hands
out copies, does not know bfloat16, and does not tell where a tensor lies in the file. Its rules are kept:
whatever it rejects is rejected here (the tests compare).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.file import map_file, parse_json, read_json
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_FORMATS = {"F32": TensorFormat.F32, "F16": TensorFormat.F16, "BF16": TensorFormat.BF16}
_INTEGER_DTYPES = {
    "BOOL": "|u1", "U8": "|u1", "I8": "|i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4",
    "I64": "<i8", "U64": "<u8",
}  # fmt: skip

# Constants that old exports stored beside the weights; models compute them. They may have any element type.
_BUFFERS = (".position_ids", ".rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class IntegerTensor:
    """Whole numbers in a file: a part of a quantized weight."""

    name: str
    dtype: str  # as safetensors has it
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @property
    def values(self) -> NDArray[Any]:
        """The numbers in their shape: a view of the file."""
        return self.data.view(_INTEGER_DTYPES[self.dtype]).reshape(self.shape)


Part = StoredTensor | IntegerTensor
"""What a file has under a name: a tensor, or a part of one."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """An entry of a file's header, and its bytes."""

    name: str
    dtype: str  # as safetensors has it
    shape: tuple[int, ...]
    begin: int  # of the bytes in the body, which tensors fill without holes
    data: NDArray[np.uint8]


def read_safetensors(path: Path) -> dict[str, Part]:
    """What one file holds, by name; nothing but the header is read.

    Raises:
        CheckpointError: the file is truncated or its header is inconsistent.
        UnsupportedError: a tensor has an element type that we do not have.
    """
    parts: dict[str, Part] = {}
    for raw in read_raw(path)[1]:
        if f".{raw.name}".endswith(_BUFFERS):
            continue
        if raw.dtype in _FORMATS:
            parts[raw.name] = StoredTensor(raw.name, _FORMATS[raw.dtype], raw.shape, raw.data)
        else:
            parts[raw.name] = IntegerTensor(raw.name, raw.dtype, raw.shape, raw.data)
    return parts


def read_raw(path: Path) -> tuple[bytes, list[RawTensor]]:
    """All bytes of a file: those before the body, and the tensors in the order of the header. Raises as
    `read_safetensors`."""
    buffer = map_file(path)
    header, body = _split(path, buffer)
    spans = []
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            _check_metadata(path, entry)
            continue
        dtype, shape, begin, end = _parse_entry(path, name, entry)
        spans.append((begin, end, name))
        element_bytes = _element_bytes(dtype)
        if element_bytes is None:
            raise _unsupported(path, name, dtype)
        num_bytes = math.prod(shape) * element_bytes
        if end - begin != num_bytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} spans {end - begin} bytes, {dtype} {list(shape)} needs {num_bytes}"
            )
        found.append(RawTensor(name, dtype, shape, begin, body[begin:end]))
    _check_spans(path, spans, len(body))
    return buffer[: len(buffer) - len(body)].tobytes(), found


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file's header keeps beside its tensors. Raises as `read_safetensors`."""
    entry = _split(path, map_file(path))[0].get("__metadata__", {})
    _check_metadata(path, entry)
    return dict(entry)


def only_tensors(path: Path, parts: Mapping[str, Part]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint that has nothing else.

    Raises:
        UnsupportedError: it has whole numbers.
    """
    tensors = {}
    for name, part in parts.items():
        if isinstance(part, IntegerTensor):
            raise _unsupported(path, name, part.dtype)
        tensors[name] = part
    return tensors


def read_sharded_safetensors(index_path: Path) -> dict[str, Part]:
    """What is in all shards that an index (`model.safetensors.index.json`) names.

    Raises:
        CheckpointError: the index and the shards disagree, or a shard is corrupt.
        UnsupportedError: a tensor has an element type that we do not have.
    """
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index_path}: weight_map is missing or does not map tensors to file names")
    tensors: dict[str, Part] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path}: shard {file_name!r} is not the name of a .safetensors file beside the index"
            )
        shard = read_safetensors(index_path.parent / file_name)
        for name, tensor in shard.items():
            if weight_map.get(name) != file_name:
                raise CheckpointError(
                    f"{index_path}: tensor {name!r} lies in {file_name}, the index denies it"
                )
            tensors[name] = tensor
    missing = sorted(n for n in weight_map if n not in tensors and not f".{n}".endswith(_BUFFERS))
    if missing:
        raise CheckpointError(
            f"{index_path}: {len(missing)} tensors are in no shard, among them {missing[0]!r}"
        )
    return tensors


def _element_bytes(dtype: str) -> int | None:
    if dtype in _FORMATS:
        return _FORMATS[dtype].block_bytes
    return np.dtype(_INTEGER_DTYPES[dtype]).itemsize if dtype in _INTEGER_DTYPES else None


def _split(path: Path, buffer: NDArray[np.uint8]) -> tuple[JsonObject, NDArray[np.uint8]]:
    """Header and body of the file."""
    if len(buffer) < _LENGTH_BYTES:
        raise CheckpointError(f"{path} is truncated: {len(buffer)} bytes, no safetensors header")
    length = int.from_bytes(buffer[:_LENGTH_BYTES].tobytes(), "little")
    limit = min(_MAX_HEADER_BYTES, len(buffer) - _LENGTH_BYTES)
    if length > limit:
        raise CheckpointError(
            f"{path}: the safetensors header claims {length} bytes, the limit is {limit}",
            hint="the file is truncated or no safetensors file: download the model again",
        )
    text = buffer[_LENGTH_BYTES : _LENGTH_BYTES + length].tobytes()
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the safetensors header does not start with '{{'")
    return parse_json(text, f"the safetensors header of {path}"), buffer[_LENGTH_BYTES + length :]


def _check_metadata(path: Path, entry: Any) -> None:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise CheckpointError(f"{path}: __metadata__ of the safetensors header is not a map of texts")


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Element type, shape, begin and end of one header entry."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **extra} if not extra:
            if all(_is_count(n) for n in (*shape, begin, end)) and begin <= end:
                return dtype, tuple(shape), begin, end
    raise CheckpointError(
        f"{path}: the safetensors header entry of tensor {name!r} is malformed: {entry!s:.200}"
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_spans(path: Path, spans: list[tuple[int, int, str]], body_bytes: int) -> None:
    """Tensors must fill the body exactly: no hole, no overlap, nothing left over."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {begin}, the previous one ends at {position}"
            )
        position = end
    if position != body_bytes:
        raise CheckpointError(
            f"{path}: tensors need {position} bytes after the header, the file holds {body_bytes}",
            hint="the file is truncated or damaged: download the model again",
        )


def _unsupported(path: Path, name: str, dtype: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: tensor {name!r} has element type {dtype}, supported are {', '.join(_FORMATS)}"
    )
