"""The sidecar `fastserve.safetensors`: whole numbers with scales that no other format holds, as small as they
get without an entropy coder.

It is a safetensors file. Each weight is these tensors, where it has them (streams: `bit_stream.py`):

    NAME.codes    U8       stream of codes + 2^(bits - 1): of all elements, or of entries (`packed_lines.py`)
    NAME.mask     U8       stream of bits, row by row: which elements have codes (bitmask)
    NAME.counts   U16, U32 entries of each row (bitmask, CSR), or of each column of each strip (CSC)
    NAME.gaps     U8       stream: elements that a line skips before each entry (CSR, CSC)
    NAME.scales   BF16, F16, F32 [rows, groups]
    NAME.zeros    U8       stream of zero points + 2^(bits - 1) [rows, groups]
    NAME.groups   I32      the group of each column, where those of a group are no neighbours

What is left out stands for zero: it is the zero point of its group. The header's metadata has, as JSON under
`weights`, `{NAME: {"shape", "bits", "group_size", "storage", "gap_bits"}}`. Tensors of floats are not here
but in the folder's other files; its config says `{"quant_method": "fastserve", "version": 1}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.bit_stream import pack_pieces, stream_bytes, unpack_stream
from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.file import parse_json
from fastserve.checkpoint.grouped_tensor import GroupedTensor, Groups, to_signed
from fastserve.checkpoint.packed_layout import MOST_EXPANSION, Layout, choose_layout, encode
from fastserve.checkpoint.packed_lines import GAP_BITS, PackedStorage, StoredCodes, num_strips
from fastserve.checkpoint.rounding import row_pieces
from fastserve.checkpoint.safetensors import Part, read_metadata, read_safetensors
from fastserve.checkpoint.safetensors_writer import WrittenTensor, write_safetensors
from fastserve.checkpoint.weight_parts import WeightParts
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject, UInt8Array

PACKED_FILE = "fastserve.safetensors"
QUANT_METHOD = "fastserve"
VERSION = 1
BITS = range(2, 9)


def packed_config() -> JsonObject:
    """The `quantization_config` of a folder with a sidecar."""
    return {"quant_method": QUANT_METHOD, "version": VERSION}


@dataclass(frozen=True, slots=True)
class PackedSize:
    """What became of one weight.

    Attributes:
        num_zeros: elements that stand for zero.
        file_bytes: of its tensors in the file.
        expanded_bytes: where it is used densely: codes of 4 or 8 bits, and two bytes for each scale and zero
            point.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    storage: PackedStorage
    num_zeros: int
    file_bytes: int
    expanded_bytes: int


@dataclass(frozen=True, slots=True)
class PackedSizes:
    """What `write_packed` wrote. `file_bytes` is the whole file, its header included."""

    weights: tuple[PackedSize, ...]
    file_bytes: int

    @property
    def expanded_bytes(self) -> int:
        return sum(weight.expanded_bytes for weight in self.weights)

    def to_json(self) -> JsonObject:
        return {
            "file_bytes": self.file_bytes,
            "expanded_bytes": self.expanded_bytes,
            "weights": [asdict(weight) for weight in self.weights],
        }


def write_packed(folder: Path, weights: Mapping[str, GroupedTensor]) -> PackedSizes:
    """Write the sidecar of a folder, each weight in the smallest storage. Weights are read in pieces, and
    what one is packed to is in memory at a time.

    >>> write_packed(Path("model"), {"a.weight": weight}).file_bytes  # doctest: +SKIP
    8192

    Raises:
        UnsupportedError: a weight of one bit, or of more than eight.
        OSError: the file cannot be written.
    """
    for name, weight in weights.items():
        if weight.bits not in BITS:
            raise UnsupportedError(
                f"{name} has {weight.bits} bits, the sidecar holds {BITS.start} to {BITS[-1]}"
            )
    writers = [_WeightWriter(name, weight) for name, weight in weights.items()]
    described = {writer.name: writer.describe() for writer in writers}
    path = folder / PACKED_FILE
    tensors = [tensor for writer in writers for tensor in writer.tensors()]
    write_safetensors(path, tensors, {"weights": json.dumps(described, separators=(",", ":"))})
    return PackedSizes(tuple(writer.size() for writer in writers), path.stat().st_size)


class _WeightWriter:
    """The tensors of one weight. Codes and what says where they are come out of one reading."""

    def __init__(self, name: str, weight: GroupedTensor) -> None:
        self.name = name
        self._weight = weight
        self._layout: Layout = choose_layout(weight)
        self._has_zeros = weight.has_zeros()
        self._encoded: dict[str, NDArray[Any]] = {}

    def describe(self) -> JsonObject:
        described: dict[str, object] = {
            "shape": list(self._weight.shape),
            "bits": self._weight.bits,
            "group_size": min(self._weight.group_size, self._weight.shape[1]),
            "storage": self._layout.storage,
        }
        if self._layout.gap_bits:
            described["gap_bits"] = self._layout.gap_bits
        return described

    def tensors(self) -> list[WrittenTensor]:
        rows, depth = self._weight.shape
        num_groups = self._weight.num_groups
        sizes = self._layout.sizes()
        written = []
        for part, size in sizes.items():
            dtype = self._layout.counts_dtype if part == "counts" else "U8"
            count = self._layout.num_lines if part == "counts" else size
            written.append(WrittenTensor(f"{self.name}.{part}", dtype, (count,), partial(self._take, part)))
        scales = WrittenTensor(
            f"{self.name}.scales", self._weight.format.name, (rows, num_groups), self._scales
        )
        written.append(scales)
        if self._has_zeros:
            num_bytes = stream_bytes(rows * num_groups, self._weight.bits)
            written.append(WrittenTensor(f"{self.name}.zeros", "U8", (num_bytes,), self._zeros))
        of_column = self._weight.group_of_column
        if of_column is not None:
            written.append(WrittenTensor(f"{self.name}.groups", "I32", (depth,), lambda: [of_column]))
        return written

    def size(self) -> PackedSize:
        rows, depth = self._weight.shape
        num_groups = rows * self._weight.num_groups
        bits = 4 if self._weight.bits <= 4 else 8
        return PackedSize(
            name=self.name,
            shape=(rows, depth),
            bits=self._weight.bits,
            storage=self._layout.storage,
            num_zeros=self._layout.num_zeros,
            file_bytes=sum(tensor.num_bytes for tensor in self.tensors()),
            expanded_bytes=rows * depth * bits // 8 + num_groups * (4 if self._has_zeros else 2),
        )

    def _take(self, part: str) -> list[NDArray[Any]]:
        """A part, which is not kept: the writer asks for each once, in order."""
        if part not in self._encoded:
            self._encoded = encode(self._weight, self._layout)
        return [self._encoded.pop(part)]

    def _scales(self) -> Iterable[UInt8Array]:
        for begin, end in row_pieces(self._weight.shape):
            yield to_float_format(self._weight.groups(begin, end).scales, self._weight.format)

    def _zeros(self) -> Iterable[UInt8Array]:
        shape = self._weight.shape
        return pack_pieces((self._zeros_from_zero(*piece) for piece in row_pieces(shape)), self._weight.bits)

    def _zeros_from_zero(self, begin: int, end: int) -> UInt8Array:
        middle = np.uint8(2 ** (self._weight.bits - 1))
        zeros = self._weight.groups(begin, end).zeros
        if zeros is None:  # of these rows
            return np.full((end - begin, self._weight.num_groups), middle)
        return np.ascontiguousarray(zeros).view(np.uint8) + middle


def read_packed(folder: Path, config: JsonObject, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts of a folder, and the weights of its sidecar.

    Raises:
        UnsupportedError: another version of the format.
        CheckpointError: the sidecar is missing, damaged, or contradicts itself or the other files.
    """
    if config.get("version") != VERSION:
        raise UnsupportedError(
            f"{folder} is packed in version {config.get('version')!r:.80}, supported is {VERSION}",
            hint="a newer FastServe may open it, and `fastserve convert` there write it in another format",
        )
    path = folder / PACKED_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, which holds the weights of this model", hint="download the model again"
        )
    described = parse_json(read_metadata(path).get("weights", "").encode(), f"`weights` in {path}")
    left = read_safetensors(path)
    weights: dict[str, Part] = {
        name: _read_weight(WeightParts(folder, name, left), entry) for name, entry in described.items()
    }
    if left:
        raise CheckpointError(f"{path}: its header says nothing of {next(iter(left))}")
    if doubled := weights.keys() & parts.keys():
        raise CheckpointError(f"{folder}: {min(doubled)} is in {PACKED_FILE} and in another file")
    return {**parts, **weights}


@dataclass(frozen=True, slots=True)
class _Description:
    """What the header says of a weight."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    storage: PackedStorage
    gap_bits: int


def _read_weight(parts: WeightParts, entry: object) -> GroupedTensor:
    about = _parse_entry(parts, entry)
    (rows, depth), bits = about.shape, about.bits
    stored = _read_codes(parts, about)
    num_groups = -(-depth // about.group_size)
    scales = parts.floats("scales")
    if scales.shape != (rows, num_groups):
        raise parts.contradict(f"scales are {list(scales.shape)}, {[rows, num_groups]} were expected")
    packed_zeros = parts.optional_integers("zeros", "U8")
    if packed_zeros is not None and packed_zeros.shape != (stream_bytes(rows * num_groups, bits),):
        raise parts.contradict(f"zeros take {packed_zeros.size} bytes, {rows * num_groups} numbers do not")
    of_column = parts.group_of_column("groups", depth, num_groups)

    def zeros_from_zero(begin: int, end: int) -> UInt8Array | None:
        if packed_zeros is None:
            return None
        count = (end - begin) * num_groups
        return unpack_stream(packed_zeros, begin * num_groups, count, bits).reshape(-1, num_groups)

    def read(begin: int, end: int) -> Groups:
        zeros = zeros_from_zero(begin, end)

        def left_out() -> UInt8Array:
            if zeros is None:
                return np.full((end - begin, depth), 2 ** (bits - 1), np.uint8)
            return zeros[:, weight.column_groups()]

        codes = to_signed(stored.read(begin, end, left_out), bits)
        signed_zeros = None if zeros is None else to_signed(zeros, bits)
        return Groups(codes, signed_zeros, to_f32(scales.rows(begin, end)))

    def read_zeros() -> NDArray[np.int8] | None:
        zeros = zeros_from_zero(0, rows)
        return None if zeros is None else to_signed(zeros, bits)

    weight = GroupedTensor(
        parts.module,
        scales.format,
        about.shape,
        read,
        read_zeros,
        bits=bits,
        group_size=about.group_size,
        group_of_column=of_column,
    )
    return weight


def _parse_entry(parts: WeightParts, entry: object) -> _Description:
    match entry:
        case {
            "shape": [int(rows), int(depth)],
            "bits": int(bits),
            "group_size": int(group_size),
            "storage": str(storage),
            **more,
        } if more.keys() <= {"gap_bits"} and storage in get_args(PackedStorage):
            gap_bits = more.get("gap_bits", 0)
            is_possible = rows >= 1 and 1 <= group_size <= depth < 2**31 and bits in BITS
            known_gap_bits = GAP_BITS if storage in ("csr", "csc") else [0]
            if is_possible and type(gap_bits) is int and gap_bits in known_gap_bits:
                return _Description((rows, depth), bits, group_size, storage, gap_bits)  # type: ignore[arg-type]
    raise parts.contradict(f"the header says what cannot be: {entry!s:.200}")


def _read_codes(parts: WeightParts, about: _Description) -> StoredCodes:
    rows, depth = about.shape
    codes = parts.integers("codes", "U8")
    mask = parts.integers("mask", "U8") if about.storage == "bitmask" else None
    counts = parts.integers("counts", "U16", "U32") if about.storage != "dense" else None
    gaps = parts.integers("gaps", "U8") if about.gap_bits else None
    found = [part for part in (codes, mask, counts, gaps) if part is not None]
    num_bytes = sum(part.nbytes for part in found)
    num_lines = num_strips(rows) * depth if about.storage == "csc" else rows
    if any(part.ndim != 1 for part in found):
        raise parts.contradict("its parts are no streams")
    if rows * depth > MOST_EXPANSION * num_bytes:
        raise parts.contradict(
            f"{num_bytes} bytes are to hold {rows} x {depth} elements; the limit is {MOST_EXPANSION} each"
        )
    if about.storage == "dense" and len(codes) != stream_bytes(rows * depth, about.bits):
        raise parts.contradict(f"codes take {len(codes)} bytes, not what {rows} x {depth} elements do")
    if mask is not None and len(mask) != stream_bytes(rows * depth, 1):
        raise parts.contradict(f"mask takes {len(mask)} bytes, not what {rows} x {depth} bits do")
    if counts is not None and len(counts) != num_lines:
        raise parts.contradict(f"{len(counts)} lines are counted, {num_lines} were expected")
    return StoredCodes(
        where=f"{parts.folder}: {parts.module}",
        storage=about.storage,
        shape=about.shape,
        bits=about.bits,
        codes=codes,
        mask=mask,
        counts=counts,
        gaps=gaps,
        gap_bits=about.gap_bits,
    )
