"""Writes a model as one GGUF file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.conversion import FLOATS, Conversion, ConvertedWeights, Matrices, describe, is_float
from fastserve.checkpoint.gguf_arrangement import Order, change_there
from fastserve.checkpoint.gguf_blocks import BLOCK, exact_blocks, move_to_blocks, round_to_blocks
from fastserve.checkpoint.gguf_export import (
    export_metadata,
    extra_tensors,
    family_of,
    window_that_is_ignored,
)
from fastserve.checkpoint.gguf_modules import find_place
from fastserve.checkpoint.gguf_writer import WrittenGgufTensor, write_gguf
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, OptionError

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
    family = family_of(checkpoint)
    metadata = export_metadata(checkpoint)
    writer = _Writer(checkpoint, weights, matrices, conversion)
    for name, tensor in checkpoint.tensors.items():
        writer.add(name, tensor)
    for name, tensor in extra_tensors(checkpoint).items():
        writer.add_extra(name, tensor)
    write_gguf(folder / f"{conversion.output.name}.gguf", metadata, writer.written())
    if (window := window_that_is_ignored(checkpoint)) is not None:
        conversion.remarks.append(
            f"llama.cpp lets every token of a {family.architecture} see all others: texts of more than"
            f" {window} tokens, its window, are computed otherwise there"
        )


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor in the format that it is written in.

    Attributes:
        order: the rows that are written, where that is not all of them in order.
        is_moved: whether its whole numbers are, and not rounded.
    """

    tensor: StoredTensor
    format: TensorFormat
    order: Order | None = None
    is_moved: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape
        return shape if self.order is None else (len(self.order), *shape[1:])

    def pieces(self) -> Iterable[NDArray[np.uint8]]:
        """Its bytes, some rows at a time; all at once where they are in another order."""
        if self.is_moved:
            assert isinstance(self.tensor, GroupedTensor)
            pieces = move_to_blocks(self.tensor, self.format)
        else:
            pieces = round_to_blocks(self.tensor, self.format)
        if self.order is None:
            yield from pieces
        else:
            rows = np.concatenate(list(pieces)).reshape(self.tensor.shape[0], -1)
            yield rows[self.order].reshape(-1)


class _Writer:
    """Gathers what is written, under the names of GGUF: the matrices of experts under one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: ConvertedWeights,
        matrices: Matrices,
        conversion: Conversion,
    ) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        self._matrices = matrices
        self._conversion = conversion
        self._made: dict[str, dict[int | None, _Made]] = {}

    def add(self, name: str, tensor: StoredTensor) -> None:
        """A tensor of the model, by its Hugging Face name."""
        config = self._checkpoint.config
        place = find_place(config, name)
        if place is None:
            self._conversion.note("left out", f"GGUF has no place for {name.rpartition('.')[0] or name}")
            return
        # A T5 says that of every head.
        is_tied = config.get("tie_word_embeddings") and config["model_type"] != "t5"
        if place.name == "output.weight" and is_tied:
            self._conversion.note("left out", "the embedding is the head")
            return
        tensor, order = change_there(name, tensor, config)
        made = replace(self._choose(name, place.name, tensor), order=order)
        self._made.setdefault(place.name, {})[place.expert] = made

    def add_extra(self, name: str, tensor: StoredTensor) -> None:
        """A tensor that the model does not have, by its name in GGUF."""
        is_matrix = len(tensor.shape) == 2
        self._made[name] = {
            None: self._choose_matrix(tensor, is_table=True) if is_matrix else _Made(tensor, tensor.format)
        }

    def written(self) -> list[WrittenGgufTensor]:
        """
        Raises:
            CheckpointError: there is no embedding, or an expert is missing.
        """
        if "token_embd.weight" not in self._made:
            raise CheckpointError(f"{self._checkpoint.path} has no embedding of tokens")
        return [self._join(name, made) for name, made in self._made.items()]

    def _join(self, name: str, made: dict[int | None, _Made]) -> WrittenGgufTensor:
        if None in made:
            (only,) = made.values()
            # Of one row, the gate of a shared expert is a vector there.
            shape = only.shape[1:] if name.endswith("gate_inp_shexp.weight") else only.shape
            return WrittenGgufTensor(name, only.format, shape, only.pieces)
        parts = [made[index] for index in range(len(made)) if index in made]
        shapes = {(part.shape, part.format) for part in parts}
        if len(parts) != len(made) or len(shapes) > 1:
            raise CheckpointError(f"{self._checkpoint.path}: the experts in {name} are not of one kind")
        return WrittenGgufTensor(
            name,
            parts[0].format,
            (len(parts), *parts[0].shape),
            lambda: chain.from_iterable(part.pieces() for part in parts),
        )

    def _choose(self, name: str, name_there: str, tensor: StoredTensor) -> _Made:
        matrices = self._matrices
        is_table = name in matrices.tables
        is_linear = name in matrices.linears or name in matrices.experts or name in matrices.rearranged
        is_gate = ".ffn_gate_inp" in name_there
        if len(tensor.shape) == 2 and (is_table or (is_linear and not is_gate)):
            return self._choose_matrix(tensor, is_table=is_table)
        # As in llama.cpp's own files: its kernels expect float32 where nothing is multiplied with.
        self._conversion.note_floats(tensor, TensorFormat.F32)
        return _Made(tensor, TensorFormat.F32)

    def _choose_matrix(self, tensor: StoredTensor, *, is_table: bool) -> _Made:
        weights, conversion = self._weights, self._conversion
        if weights in FLOATS or (weights == "auto" and is_float(tensor)):
            stored_format = FLOATS.get(weights, tensor.format)
            conversion.note_floats(tensor, stored_format)
            return _Made(tensor, stored_format)
        is_int4 = weights == "int4" and not is_table
        if (kept := _keep(tensor, most_bits=4 if is_int4 else 8)) is not None:
            what = "as it is" if kept.format is tensor.format else f"exactly as {kept.format.value}"
            conversion.note(f"kept {what}", f"from {describe(tensor)}")
            return kept
        wanted = _ROUNDED["int4" if is_int4 else "int8"]
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
