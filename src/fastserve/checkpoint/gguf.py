"""Reads GGUF files (ggml-org/ggml docs/gguf.md; versions 2 and 3, little-endian) as views of the mapped file.

Every length is checked against the bytes that are left before it is used: a hostile file costs neither memory
nor time. Why this is not the `gguf` library: docs/decisions/0002-own-gguf-reader.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.file import map_file
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, UnsupportedError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 65535  # gguf.md: keys are at most 2^16 - 1 bytes
_MIN_PAIR_BYTES = 8 + 4 + 1  # key length, value type, the shortest value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, number of dimensions, one dimension, type, offset

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
SCALAR_DTYPES = {code: np.dtype(text) for code, text in _SCALARS.items()}

FORMATS = {
    0: TensorFormat.F32,
    1: TensorFormat.F16,
    2: TensorFormat.Q4_0,
    3: TensorFormat.Q4_1,
    6: TensorFormat.Q5_0,
    7: TensorFormat.Q5_1,
    8: TensorFormat.Q8_0,
    10: TensorFormat.Q2_K,
    11: TensorFormat.Q3_K,
    12: TensorFormat.Q4_K,
    13: TensorFormat.Q5_K,
    14: TensorFormat.Q6_K,
    20: TensorFormat.IQ4_NL,
    30: TensorFormat.BF16,
}
# Names of the types that we cannot read yet (enum ggml_type of ggml.h), for the message.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_DAMAGED = "the file is damaged or badly converted: download the model again"

_LENGTH = struct.Struct("<Q")


class StringArray(Sequence[str]):
    """An array of texts in the mapped file, decoded when asked for."""

    def __init__(self, path: Path, buffer: memoryview, offsets: list[int]) -> None:
        self._path = path
        self._buffer = buffer
        self._offsets = offsets  # of each text's length, and behind the last text

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        positions = range(len(self))[index]
        return self._text(positions) if isinstance(positions, int) else [self._text(i) for i in positions]

    def __iter__(self) -> Iterator[str]:
        return map(self._text, range(len(self)))

    def _text(self, index: int) -> str:
        start, end = self._offsets[index] + _LENGTH.size, self._offsets[index + 1]
        return _decode(self._path, self._buffer[start:end])


GgufValue = bool | int | float | str | NDArray[Any] | StringArray


class GgufMetadata(Mapping[str, GgufValue]):
    """The key-value pairs of a GGUF file, with getters that check the type of what they return."""

    def __init__(self, path: Path, values: Mapping[str, GgufValue]) -> None:
        self.path = path
        self._values = values

    def __getitem__(self, key: str) -> GgufValue:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def text(self, key: str) -> str | None:
        value = self._values.get(key)
        return value if value is None or isinstance(value, str) else self._refuse(key, "a text")

    def flag(self, key: str) -> bool | None:
        value = self._values.get(key)
        return value if value is None or isinstance(value, bool) else self._refuse(key, "a boolean")

    def integer(self, key: str) -> int | None:
        value = self._values.get(key)
        return value if value is None or type(value) is int else self._refuse(key, "an integer")

    def number(self, key: str) -> float | None:
        """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
        value = self._values.get(key)
        if value is None:
            return None
        if type(value) not in (int, float):
            self._refuse(key, "a number")
        return float(str(np.float32(value)))  # type: ignore[arg-type]

    def texts(self, key: str) -> Sequence[str] | None:
        value = self._values.get(key)
        return (
            value
            if value is None or isinstance(value, StringArray)
            else self._refuse(key, "an array of texts")
        )

    def array(self, key: str) -> NDArray[Any] | None:
        value = self._values.get(key)
        return (
            value
            if value is None or isinstance(value, np.ndarray)
            else self._refuse(key, "an array of numbers")
        )

    def _refuse(self, key: str, expected: str) -> Any:
        raise CheckpointError(
            f"{self.path}: {key} is {self._values[key]!s:.80}, {expected} was expected", hint=_DAMAGED
        )


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds: metadata, and tensors under their GGUF names with row-major shapes."""

    path: Path
    metadata: GgufMetadata
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def architecture(self) -> str:
        return self.metadata.text("general.architecture") or "unknown"


def read_gguf(path: Path) -> GgufFile:
    """Read the metadata of a GGUF file and map its tensors.

    Raises:
        CheckpointError: the file is truncated or inconsistent.
        UnsupportedError: it has a version or a tensor type that we do not have.
    """
    buffer = map_file(path)
    cursor = _Cursor(path, buffer.data)
    _check_version(cursor)
    num_tensors = cursor.count("tensors", _MIN_TENSOR_BYTES)
    num_pairs = cursor.count("key-value pairs", _MIN_PAIR_BYTES)
    values: dict[str, GgufValue] = {}
    for _ in range(num_pairs):
        key = cursor.name("key")
        if key in values:
            raise CheckpointError(f"{path}: key {key!r} is repeated", hint=_DAMAGED)
        values[key] = cursor.value(key)
    metadata = GgufMetadata(path, values)
    alignment = _alignment(metadata)
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors = _map_tensors(path, buffer, data_start, alignment, entries)
    return GgufFile(path, metadata, tensors)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    format: TensorFormat
    shape: tuple[int, ...]  # row-major: GGUF stores it innermost first
    offset: int  # from the start of the data section


class _Cursor:
    """Walks over the header. Reading past the end of the file is a CheckpointError."""

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path = path
        self.position = 0
        self._buffer = buffer

    def take(self, num_bytes: int, what: str) -> memoryview:
        end = self.position + num_bytes
        if end > len(self._buffer):
            raise CheckpointError(
                f"{self.path} is truncated: {what} at byte {self.position} needs {num_bytes} bytes,"
                f" {len(self._buffer) - self.position} are left",
                hint=_DAMAGED,
            )
        taken = self._buffer[self.position : end]
        self.position = end
        return taken

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, min_bytes: int) -> int:
        """How many things of at least `min_bytes` each follow; more than fit in the file is an error."""
        count = self.u64(f"the number of {what}")
        limit = (len(self._buffer) - self.position) // min_bytes
        if count > limit:
            raise CheckpointError(
                f"{self.path} claims {count} {what}, the file has room for {limit}",
                hint=_DAMAGED,
            )
        return count

    def name(self, what: str) -> str:
        length = self.u64(f"the length of a {what}")
        if not 0 < length <= _MAX_NAME_BYTES:
            raise CheckpointError(
                f"{self.path}: a {what} of {length} bytes at byte {self.position},"
                f" the limits are 1 and {_MAX_NAME_BYTES}",
                hint=_DAMAGED,
            )
        return _decode(self.path, self.take(length, f"a {what}"))

    def value(self, key: str) -> GgufValue:
        code = self.u32(f"the type of {key}")
        if code == _STRING:
            return _decode(self.path, self.take(self.u64(f"the length of {key}"), key))
        if code == _ARRAY:
            return self._array(key)
        value: bool | int | float = self._numbers(key, code, 1)[0].item()
        return value

    def _array(self, key: str) -> NDArray[Any] | StringArray:
        code = self.u32(f"the element type of {key}")
        if code == _STRING:
            return self._strings(self.count(f"texts of {key}", _LENGTH.size))
        if code == _ARRAY:
            raise UnsupportedError(f"{self.path}: {key} is an array of arrays, which is not supported")
        return self._numbers(key, code, self.count(f"elements of {key}", 1))

    def _numbers(self, key: str, code: int, count: int) -> NDArray[Any]:
        dtype = SCALAR_DTYPES.get(code)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {key} has value type {code}, the largest known is {max(_SCALARS)}",
                hint=_DAMAGED,
            )
        data = self.take(count * dtype.itemsize, key)
        if dtype == np.bool_ and max(bytes(data), default=0) > 1:
            raise CheckpointError(
                f"{self.path}: {key} holds a boolean that is neither 0 nor 1", hint=_DAMAGED
            )
        return np.frombuffer(data, dtype).copy()

    def _strings(self, count: int) -> StringArray:
        """Walk over the lengths only: this loop is most of the time it takes to open a file."""
        buffer, position, unpack = self._buffer, self.position, _LENGTH.unpack_from
        offsets = [position]
        try:
            for _ in range(count):
                position += 8 + unpack(buffer, position)[0]
                offsets.append(position)
        except (struct.error, OverflowError):
            position = len(buffer) + 1
        if position > len(buffer):
            raise CheckpointError(
                f"{self.path} is truncated: {count} texts at byte {self.position} do not fit in the file",
                hint=_DAMAGED,
            )
        self.position = position
        return StringArray(self.path, buffer, offsets)


def _decode(path: Path, data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: a text is not valid UTF-8: {bytes(data[:40])!r}", hint=_DAMAGED
        ) from error


def _check_version(cursor: _Cursor) -> None:
    magic = bytes(cursor.take(len(_MAGIC), "the magic"))
    if magic != _MAGIC:
        raise CheckpointError(
            f"{cursor.path} is no GGUF file: it starts with {magic!r}, not {_MAGIC!r}", hint=_DAMAGED
        )
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
        found = f"{swapped}, big-endian" if swapped in _VERSIONS else str(version)
        raise UnsupportedError(
            f"{cursor.path} has GGUF version {found},"
            f" supported are {' and '.join(map(str, _VERSIONS))}, little-endian"
        )


def _alignment(metadata: GgufMetadata) -> int:
    alignment = metadata.integer("general.alignment")
    if alignment is None:
        return _DEFAULT_ALIGNMENT
    if not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{metadata.path}: general.alignment is {alignment}, a power of two up to {2**20} was expected",
            hint=_DAMAGED,
        )
    return alignment


def _read_entry(cursor: _Cursor) -> _Entry:
    name = cursor.name("tensor name")
    num_dimensions = cursor.u32(f"the number of dimensions of {name}")
    if not 0 < num_dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} has {num_dimensions} dimensions,"
            f" the limits are 1 and {_MAX_DIMENSIONS}",
            hint=_DAMAGED,
        )
    shape = tuple(cursor.u64(f"a dimension of {name}") for _ in range(num_dimensions))[::-1]
    if 0 in shape:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} has shape {list(shape)}, an empty dimension", hint=_DAMAGED
        )
    code = cursor.u32(f"the type of {name}")
    offset = cursor.u64(f"the offset of {name}")
    format_ = FORMATS.get(code)
    if format_ is None:
        supported = ", ".join(f.name for f in TensorFormat)
        raise UnsupportedError(
            f"{cursor.path}: tensor {name!r} has type {_OTHER_TYPES.get(code, code)},"
            f" supported are {supported}",
            hint="download the model in one of these formats",
        )
    if shape[-1] % format_.block_elements:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} has rows of {shape[-1]} elements,"
            f" {format_.name} needs a multiple of {format_.block_elements}",
            hint=_DAMAGED,
        )
    return _Entry(name, format_, shape, offset)


def _map_tensors(
    path: Path, buffer: NDArray[np.uint8], data_start: int, alignment: int, entries: list[_Entry]
) -> dict[str, StoredTensor]:
    """Views of the data section, once it is certain that tensors lie in the file, aligned and apart."""
    tensors: dict[str, StoredTensor] = {}
    previous_end, previous_name = data_start, ""
    for entry in sorted(entries, key=lambda e: e.offset):
        begin = data_start + entry.offset
        end = begin + entry.format.num_bytes(entry.shape)
        if entry.name in tensors:
            raise CheckpointError(f"{path}: tensor {entry.name!r} is repeated", hint=_DAMAGED)
        if entry.offset % alignment:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} has offset {entry.offset},"
                f" a multiple of {alignment} was expected",
                hint=_DAMAGED,
            )
        if begin < previous_end:
            raise CheckpointError(
                f"{path}: tensors {previous_name!r} and {entry.name!r} overlap", hint=_DAMAGED
            )
        if end > len(buffer):
            raise CheckpointError(
                f"{path} is truncated: tensor {entry.name!r} ends at byte {end}, the file at {len(buffer)}",
                hint=_DAMAGED,
            )
        tensors[entry.name] = StoredTensor(entry.name, entry.format, entry.shape, buffer[begin:end])
        previous_end, previous_name = end, entry.name
    return tensors
