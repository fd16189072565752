"""Writes a model as one GGUF file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.conversion import FLOATS, Conversion, ConvertedWeights, Matrices, describe, is_float
from fastserve.checkpoint.gguf_blocks import BLOCK, exact_blocks, move_to_blocks, round_to_blocks
from fastserve.checkpoint.gguf_export import (
    architecture_of,
    export_metadata,
    extra_tensors,
    gguf_name,
    in_pairs,
    turned_heads,
)
from fastserve.checkpoint.gguf_writer import WrittenGgufTensor, write_gguf
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import OptionError

_ROUNDED = {"int8": TensorFormat.Q8_0, "int4": TensorFormat.Q4_0}


def to_gguf(
    checkpoint: Checkpoint,
    weights: ConvertedWeights,
    folder: Path,
    matrices: Matrices,
    conversion: Conversion,
) -> None:
    """Write `folder`/NAME.gguf, NAME being that of the output.

    Raises:
        OptionError: GGUF has no such weights.
        UnsupportedError: the architecture or tokenizer cannot be said in GGUF.
    """
    if weights not in ("auto", *FLOATS, *_ROUNDED):
        raise OptionError(
            f"blocks of GGUF have 32 columns, which weights={weights!r} does not say", hint="use int8 or int4"
        )
    architecture = architecture_of(checkpoint)
    metadata = export_metadata(checkpoint)
    written = [_plain(tensor) for tensor in extra_tensors(checkpoint)]
    for name, tensor in checkpoint.tensors.items():
        name_there = gguf_name(architecture, name)
        if name_there is None:
            conversion.note("left out", f"GGUF has no place for {name.rpartition('.')[0] or name}")
            continue
        made = _choose(name, tensor, weights, matrices, conversion)
        heads = turned_heads(architecture, name, checkpoint.config)
        written.append(made.written(name_there, heads))
    write_gguf(folder / f"{conversion.output.name}.gguf", metadata, written)


class _Made:
    """A tensor in the format that it is written in."""

    def __init__(self, tensor: StoredTensor, stored_format: TensorFormat, *, is_moved: bool = False) -> None:
        self.format = stored_format
        self._tensor = tensor
        self._is_moved = is_moved

    def written(self, name: str, heads: int | None) -> WrittenGgufTensor:
        """Under its name; with rows in pairs where it has `heads` that turn."""
        pieces = self._pieces if heads is None else lambda: self._in_pairs(heads)
        return WrittenGgufTensor(name, self.format, self._tensor.shape, pieces)

    def _pieces(self) -> Iterable[NDArray[np.uint8]]:
        if self._is_moved:
            assert isinstance(self._tensor, GroupedTensor)
            return move_to_blocks(self._tensor, self.format)
        return round_to_blocks(self._tensor, self.format)

    def _in_pairs(self, heads: int) -> Iterable[NDArray[np.uint8]]:
        rows = np.concatenate(list(self._pieces())).reshape(self._tensor.shape[0], -1)
        yield in_pairs(rows, heads).reshape(-1)


def _plain(tensor: StoredTensor) -> WrittenGgufTensor:
    return _Made(tensor, tensor.format).written(tensor.name, None)


def _choose(
    name: str, tensor: StoredTensor, weights: ConvertedWeights, matrices: Matrices, conversion: Conversion
) -> _Made:
    is_table = name in matrices.tables
    if len(tensor.shape) != 2 or not (is_table or name in matrices.linears):
        # As in llama.cpp's own files: its kernels expect float32 where nothing is multiplied with.
        conversion.note_floats(tensor, TensorFormat.F32)
        return _Made(tensor, TensorFormat.F32)
    if weights in FLOATS or (weights == "auto" and is_float(tensor)):
        stored_format = FLOATS.get(weights, tensor.format)
        conversion.note_floats(tensor, stored_format)
        return _Made(tensor, stored_format)
    if (kept := _keep(tensor, most_bits=4 if weights == "int4" and not is_table else 8)) is not None:
        what = "as it is" if kept.format is tensor.format else f"exactly as {kept.format.value}"
        conversion.note(f"kept {what}", f"from {describe(tensor)}")
        return kept
    wanted = _ROUNDED["int4" if weights == "int4" and not is_table else "int8"]
    if tensor.shape[1] % BLOCK:
        conversion.note("kept as f16", f"{wanted.value} needs a multiple of {BLOCK} columns")
        return _Made(tensor, TensorFormat.F16)
    why = "which GGUF cannot hold" if weights == "auto" else ""
    conversion.note(f"rounded to {wanted.value} from {describe(tensor)}", why)
    return _Made(tensor, wanted)


def _keep(tensor: StoredTensor, *, most_bits: int) -> _Made | None:
    """A quantized tensor as it is, or its whole numbers moved, where they have no more bits than that."""
    if not isinstance(tensor, GroupedTensor):
        is_kept = tensor.format.block_elements > 1 and _bits(tensor.format) <= most_bits
        return _Made(tensor, tensor.format) if is_kept else None
    stored_format = exact_blocks(tensor) if tensor.bits <= most_bits else None
    return None if stored_format is None else _Made(tensor, stored_format, is_moved=True)


def _bits(stored_format: TensorFormat) -> int:
    """Bits of an element, its part of scales left out."""
    return stored_format.block_bytes * 8 // stored_format.block_elements
