"""Archives: a model's folder for small links and small disks, its tensors entropy-coded. Nothing runs from
one: it is expanded where it is opened (`archive_expansion.py`), to the very files that it was made of.

A folder with the small files of the model as they are, a config.json that says so, and one safetensors file:

    description   U8   JSON, through LZMA: by file its header, SHA-256 and tensors; by tensor its element
                       type, size and planes (`archive_coding.py`), and entries of its codebook, if any
    data          U8   in the order of the tensors' bytes: codebook, then piece by piece all planes

With `codebook_bits` matrices of floats are not kept exactly: each gets a codebook of 2^bits entries, and is
expanded to those (Han et al., Deep Compression, arXiv 1510.00149: prune, share, code).
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastserve.checkpoint.archive_codebook import Codebook, make_codebook
from fastserve.checkpoint.archive_coding import (
    Coder,
    import_coder,
    num_planes,
    pieces_of,
    plan_plane,
    split,
)
from fastserve.checkpoint.archive_expansion import ARCHIVE_FILE, ARCHIVE_METHOD, ARCHIVE_VERSION
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.file import read_json
from fastserve.checkpoint.model_files import write_model_files
from fastserve.checkpoint.safetensors import RawTensor, read_raw
from fastserve.checkpoint.safetensors_writer import WrittenTensor, write_safetensors
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import OptionError, UnsupportedError
from fastserve.hub.disk import flush_to_disk
from fastserve.option import check_integer
from fastserve.types import Float32Array, JsonObject, UInt8Array

KEPT_TEXTS = ("config.json", "*.safetensors.index.json")  # that the archive's own folder has no room for

_LEAST_SHARED = 2**12  # elements of a matrix that is worth a codebook
_PIECES_AT_A_TIME = 2**20  # bytes that are copied at a time
_STREAM_DTYPES = ("U8", "I8", "I32")  # bytes that may be made of narrower numbers


@dataclass(frozen=True, slots=True)
class ArchivedWeight:
    """What became of one weight, all its parts together.

    Attributes:
        coded_bits: of each element, scales and all that comes along included.
        entropy_bits: of each element: the order-0 entropy of all planes' symbols, which nothing that codes
            them one by one goes below.
    """

    name: str
    shape: tuple[int, ...]
    coded_bits: float
    entropy_bits: float


@dataclass(frozen=True, slots=True)
class ArchiveSizes:
    """What `write_archive` wrote.

    Attributes:
        file_bytes: of the archive's file of weights.
        entropy_bytes: of all planes of all tensors.
        source_bytes: of the files that it was made of.
        bf16_bytes: of the same weights as bfloat16.
    """

    weights: tuple[ArchivedWeight, ...]
    file_bytes: int
    entropy_bytes: int
    source_bytes: int
    bf16_bytes: int

    def to_json(self) -> JsonObject:
        return asdict(self)


def write_archive(model_folder: Path, output: Path, *, codebook_bits: int | None = None) -> ArchiveSizes:
    """Write the archive of a folder of safetensors into the folder `output`, which appears whole or not at
    all. Pieces of tensors are in memory at a time.

    Args:
        codebook_bits: 2 to 8: of the codebooks of float matrices; None keeps all numbers exactly.

    >>> write_archive(Path("smollm2-sparse50-int4"), Path("smollm2.archive")).file_bytes  # doctest: +SKIP
    46300000

    Raises:
        OptionError: `output` is there and not empty, or `codebook_bits` is out of range.
        UnsupportedError: constriction is not installed, or the model is a GGUF file.
        CheckpointError: the model's files contradict each other.
    """
    import_coder()
    if codebook_bits is not None:
        check_integer("codebook_bits", codebook_bits, low=2, high=8)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OptionError(f"{output} is not an empty folder", hint="name one that is not there yet")
    checkpoint = open_checkpoint(model_folder)
    if checkpoint.format != "safetensors":
        raise UnsupportedError(
            f"{model_folder} is a GGUF file, archives are made of folders of safetensors",
            hint="`fastserve convert` writes one",
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        sizes = _write(checkpoint, folder, codebook_bits)
        flush_to_disk([*folder.rglob("*"), folder])
        folder.chmod(0o755)
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return sizes


def _write(checkpoint: Checkpoint, folder: Path, codebook_bits: int | None) -> ArchiveSizes:
    source = checkpoint.path  # an archive's is where it was expanded
    paths = sorted(source.glob("*.safetensors"))
    described: list[JsonObject] = []
    coded: list[_Coded] = []
    data_path = folder / "data"
    with data_path.open("wb") as data:
        for path in paths:
            header, tensors = read_raw(path)
            digest = hashlib.sha256(header)
            in_order = sorted(tensors, key=lambda tensor: tensor.begin)
            found = [_write_tensor(tensor, codebook_bits, data, digest.update) for tensor in in_order]
            coded += found
            described.append(
                {
                    "name": path.name,
                    "header": header[8:].decode("utf-8"),
                    "sha256": digest.hexdigest(),
                    "tensors": [tensor.described for tensor in found],
                }
            )
    texts = {
        path.name: path.read_text(encoding="utf-8")
        for pattern in KEPT_TEXTS
        for path in sorted(source.glob(pattern))
    }
    text = json.dumps({"texts": texts, "files": described}, separators=(",", ":")).encode()
    description = np.frombuffer(lzma.compress(text, preset=9), np.uint8)
    write_safetensors(
        folder / ARCHIVE_FILE,
        [
            WrittenTensor("description", "U8", (len(description),), lambda: [description]),
            WrittenTensor("data", "U8", (data_path.stat().st_size,), lambda: _read(data_path)),
        ],
    )
    data_path.unlink()
    write_model_files(checkpoint, folder)
    config = {**read_json(source / "config.json"), "quantization_config": archive_config()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return ArchiveSizes(
        weights=tuple(_weights(checkpoint, coded)),
        file_bytes=(folder / ARCHIVE_FILE).stat().st_size,
        entropy_bytes=math.ceil(sum(tensor.entropy_bits for tensor in coded) / 8),
        source_bytes=sum(path.stat().st_size for path in paths),
        bf16_bytes=sum(2 * math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
    )


def archive_config() -> JsonObject:
    """The `quantization_config` of an archive's folder."""
    return {"quant_method": ARCHIVE_METHOD, "version": ARCHIVE_VERSION}


@dataclass(slots=True)
class _Coded:
    """What is known of a tensor that was written."""

    name: str
    described: JsonObject
    num_bytes: int = 0
    entropy_bits: float = 0.0
    lengths: list[list[int]] = field(default_factory=list)  # of coded pieces, by plane


def _write_tensor(
    tensor: RawTensor, codebook_bits: int | None, out: BinaryIO, update: Callable[[memoryview], None]
) -> _Coded:
    """Write a tensor's codebook and pieces; `update` is given what it will be expanded to."""
    codebook = _codebook_of(tensor, codebook_bits)
    dtype = tensor.dtype if codebook is None else "U8"

    def pieces() -> Iterator[UInt8Array]:
        for piece in pieces_of(tensor.data):
            yield piece if codebook is None else codebook.indices(_floats(tensor, piece))

    coded = _Coded(tensor.name, {})

    def plane_pieces(index: int) -> Iterator[UInt8Array]:
        for piece in pieces():
            yield split(piece, dtype)[index]

    planes = []
    is_stream = codebook is None and tensor.dtype in _STREAM_DTYPES
    for index in range(num_planes(dtype)):
        plane, bits = plan_plane(partial(plane_pieces, index), is_stream=is_stream)
        planes.append(plane)
        coded.entropy_bits += bits
    coders = [Coder(plane) for plane in planes]
    entries = None if codebook is None else _entry_bytes(codebook, TensorFormat[tensor.dtype])
    if entries is not None:
        out.write(entries.data)
        coded.num_bytes += entries.nbytes
    coded.lengths = [[] for _ in planes]
    for piece in pieces():
        for lengths, coder, plane_piece in zip(coded.lengths, coders, split(piece, dtype), strict=True):
            written = coder.encode(plane_piece)
            out.write(np.ascontiguousarray(written).data)
            lengths.append(len(written))
        update((piece if entries is None else entries[piece].reshape(-1)).data)
    coded.num_bytes += sum(map(sum, coded.lengths))
    coded.described = {
        "dtype": tensor.dtype,
        "bytes": len(tensor.data),
        "planes": [
            {"width": plane.width, "counts": list(plane.counts), "lengths": lengths}
            for plane, lengths in zip(planes, coded.lengths, strict=True)
        ],
    }
    if codebook is not None:
        coded.described = {**coded.described, "entries": len(codebook.entries)}
    return coded


def _entry_bytes(codebook: Codebook, stored_format: TensorFormat) -> UInt8Array:
    """[entries, bytes of each]"""
    return to_float_format(codebook.entries, stored_format).reshape(-1, stored_format.block_bytes)


def _codebook_of(tensor: RawTensor, bits: int | None) -> Codebook | None:
    is_shared = (
        bits is not None
        and tensor.dtype in TensorFormat.__members__
        and len(tensor.shape) == 2
        and math.prod(tensor.shape) >= _LEAST_SHARED
    )
    if not is_shared or bits is None:
        return None
    return make_codebook((_floats(tensor, piece) for piece in pieces_of(tensor.data)), 2**bits)


def _floats(tensor: RawTensor, piece: UInt8Array) -> Float32Array:
    stored_format = TensorFormat[tensor.dtype]
    return to_f32(StoredTensor("", stored_format, (len(piece) // stored_format.block_bytes,), piece))


def _weights(checkpoint: Checkpoint, coded: list[_Coded]) -> Iterator[ArchivedWeight]:
    """What the parts of each weight took: the tensor of its name, or those that begin with it."""
    left = {tensor.name: tensor for tensor in coded}
    for name, tensor in checkpoint.tensors.items():
        stem = name.removesuffix(".weight")
        beginnings = (f"{name}.", f"{stem}.weight")
        names = [part for part in left if part == name or part.startswith(beginnings)]
        parts = [left.pop(part) for part in names]
        count = max(math.prod(tensor.shape), 1)
        yield ArchivedWeight(
            name,
            tensor.shape,
            coded_bits=8 * sum(part.num_bytes for part in parts) / count,
            entropy_bits=sum(part.entropy_bits for part in parts) / count,
        )


def _read(path: Path) -> Iterator[UInt8Array]:
    with path.open("rb") as file:
        while piece := file.read(_PIECES_AT_A_TIME):
            yield np.frombuffer(piece, np.uint8)
