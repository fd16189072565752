"""Reads the file of an archive (`archive.py`): what it says of itself is held against its size before
anything is expanded, and what is expanded against its digests.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.checkpoint.archive_coding import PIECE_BYTES, Coder, Plane, join, num_planes, piece_sizes
from fastserve.checkpoint.file import parse_json
from fastserve.checkpoint.safetensors import read_raw
from fastserve.checkpoint.tensor import TensorFormat
from fastserve.errors import CheckpointError
from fastserve.types import JsonObject, UInt8Array

HINT = "download the archive again, or write it anew"

_MOST_DESCRIPTION_BYTES = 2**25
_MOST_EXPANSION = 256  # bytes that a byte of an archive may stand for


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What the description says of a tensor."""

    dtype: str
    num_bytes: int
    num_entries: int  # of its codebook; 0: it has none
    planes: tuple[Plane, ...]

    @property
    def element_bytes(self) -> int:
        return TensorFormat[self.dtype].block_bytes if self.num_entries else 1

    @property
    def coded_bytes(self) -> int:
        """Codebook and all."""
        return self.num_entries * self.element_bytes + sum(sum(plane.lengths) for plane in self.planes)


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    header: bytes
    sha256: str
    tensors: tuple[_Tensor, ...]


@dataclass(frozen=True, slots=True)
class Archive:
    """What a file of an archive stands for: files of safetensors, and texts."""

    path: Path
    texts: dict[str, str]
    files: tuple[_File, ...]
    data: UInt8Array

    @property
    def num_bytes(self) -> int:
        """Of what it stands for."""
        return sum(len(file.header) + sum(t.num_bytes for t in file.tensors) for file in self.files)

    def write(self, folder: Path) -> None:
        """Write the files.

        Raises:
            CheckpointError: one does not match its digest.
        """
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        at = 0
        for file in self.files:
            digest = hashlib.sha256(file.header)
            with (folder / file.name).open("wb") as out:
                out.write(file.header)
                for tensor in file.tensors:
                    for piece in _expand(tensor, self.data[at : at + tensor.coded_bytes], self.path):
                        digest.update(piece.data)
                        out.write(piece.data)
                    at += tensor.coded_bytes
            if digest.hexdigest() != file.sha256:
                raise CheckpointError(
                    f"{self.path} is damaged: {file.name} is expanded to other bytes than were archived",
                    hint=HINT,
                )


def _expand(tensor: _Tensor, coded: UInt8Array, path: Path) -> Iterator[UInt8Array]:
    """The pieces of a tensor's bytes."""
    element_bytes = tensor.element_bytes
    at = tensor.num_entries * element_bytes
    entries = np.ascontiguousarray(coded[:at]).reshape(-1, element_bytes)
    dtype = "U8" if tensor.num_entries else tensor.dtype
    try:
        coders = [Coder(plane) for plane in tensor.planes]
        for index, size in enumerate(piece_sizes(tensor.num_bytes)):
            planes = []
            for plane, coder in zip(tensor.planes, coders, strict=True):
                length = plane.lengths[index]
                count = size // element_bytes // num_planes(dtype)
                planes.append(coder.decode(coded[at : at + length], count))
                at += length
            piece = join(planes, dtype)
            yield np.ascontiguousarray(entries[piece].reshape(-1) if tensor.num_entries else piece)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint=HINT) from error


def read_archive(path: Path) -> Archive:
    """
    Raises:
        CheckpointError: the file contradicts itself, or claims to stand for more than a file of its size can.
    """
    parts = {tensor.name: tensor for tensor in read_raw(path)[1]}
    if parts.keys() != {"description", "data"} or any(part.dtype != "U8" for part in parts.values()):
        raise CheckpointError(f"{path} holds other tensors than description and data", hint=HINT)
    text = _decompress(path, parts["description"].data.tobytes())
    document = parse_json(text, f"the description in {path}")
    try:
        texts = {_checked_name(name, (".json",)): _text(text) for name, text in document["texts"].items()}
        files = tuple(_parse_file(file) for file in document["files"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: its description is malformed: {error!s:.200}", hint=HINT) from error
    archive = Archive(path, texts, files, parts["data"].data)
    coded_bytes = sum(tensor.coded_bytes for file in files for tensor in file.tensors)
    if coded_bytes != len(archive.data):
        raise CheckpointError(
            f"{path}: {coded_bytes} coded bytes are described, there are {len(archive.data)}",
            hint=HINT,
        )
    stored_bytes = path.stat().st_size
    if archive.num_bytes > _MOST_EXPANSION * stored_bytes:
        raise CheckpointError(
            f"{path} of {stored_bytes} bytes claims to stand for {archive.num_bytes}; the limit is"
            f" {_MOST_EXPANSION} times as many",
            hint=HINT,
        )
    return archive


def _decompress(path: Path, compressed: bytes) -> bytes:
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=2**28)
    try:
        text = decompressor.decompress(compressed, max_length=_MOST_DESCRIPTION_BYTES)
    except lzma.LZMAError as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}", hint=HINT) from error
    if not decompressor.eof:
        raise CheckpointError(f"{path}: its description is cut short or larger than any", hint=HINT)
    return text


def _parse_file(file: JsonObject) -> _File:
    header = _text(file["header"]).encode()
    return _File(
        name=_checked_name(file["name"], (".safetensors",)),
        header=len(header).to_bytes(8, "little") + header,
        sha256=_text(file["sha256"]),
        tensors=tuple(_parse_tensor(tensor) for tensor in file["tensors"]),
    )


def _parse_tensor(tensor: JsonObject) -> _Tensor:
    num_bytes, num_entries = _count(tensor["bytes"]), _count(tensor.get("entries", 0))
    dtype = _text(tensor["dtype"])
    if num_entries and dtype not in TensorFormat.__members__:
        raise ValueError(f"a codebook of {dtype}")
    element_bytes = TensorFormat[dtype].block_bytes if num_entries else num_planes(dtype)
    planes = tuple(_parse_plane(plane) for plane in tensor["planes"])
    num_pieces = -(-num_bytes // PIECE_BYTES)
    is_consistent = (
        num_bytes % element_bytes == 0
        and num_entries <= 256
        and len(planes) == (1 if num_entries else num_planes(dtype))
        and all(len(plane.lengths) == num_pieces for plane in planes)
    )
    if not is_consistent:
        raise ValueError(f"a tensor contradicts itself: {dtype} of {num_bytes} bytes")
    return _Tensor(dtype, num_bytes, num_entries, planes)


def _parse_plane(plane: JsonObject) -> Plane:
    width = _count(plane["width"])
    counts = tuple(_count(count) for count in plane["counts"])
    if not 1 <= width <= 8 or (counts and (len(counts) != 2**width or not 0 < sum(counts) < 2**40)):
        raise ValueError("the counts of a plane")
    if not counts and width != 8:
        raise ValueError("the width of a plane")
    return Plane(width, counts, tuple(_count(length) for length in plane["lengths"]))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _checked_name(value: Any, endings: tuple[str, ...]) -> str:
    name = _text(value)
    is_name = Path(name).name == name and not name.startswith(".")
    if not is_name or not name.endswith(endings):
        raise ValueError(f"{name!r:.80} is no name of a file of a model")
    return name
