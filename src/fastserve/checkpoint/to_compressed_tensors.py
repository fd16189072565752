"""Writes a model's linears as whole numbers with scales in the formats of compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.compressed_tensors_writer import WEIGHT, CompressedWeights
from fastserve.checkpoint.conversion import FLOATS, Conversion, ConvertedWeights, Matrices, describe, is_float
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.rounding import as_grouped, less_zeros, round_to_groups
from fastserve.checkpoint.safetensors_writer import WrittenTensor, floats
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.checkpoint.to_safetensors import write_folder
from fastserve.errors import OptionError, UnsupportedError
from fastserve.types import JsonObject

_GROUP_SIZES = {"int8": 0, "int8:g32": 32, "w8a8": 0, "int4": 64, "int4:g32": 32, "int4:g128": 128}
_ZEROS_OFF = "zero points are taken off"
_FINE_GROUP = 32  # of what the format cannot hold and that is rounded to int8 for it


def to_compressed_tensors(
    checkpoint: Checkpoint,
    weights: ConvertedWeights,
    folder: Path,
    matrices: Matrices,
    conversion: Conversion,
) -> None:
    if weights in FLOATS:
        raise OptionError(
            f"compressed-tensors hold whole numbers, not weights={weights!r}", hint="use --to safetensors"
        )
    chosen = {
        name: _keep(tensor, weights, conversion)
        for name, tensor in checkpoint.tensors.items()
        if name in matrices.linears and name.endswith(WEIGHT)
    }
    if not chosen:
        raise UnsupportedError(f"{checkpoint.path} has no matrices that can be compressed")
    kept = {name: tensor for name, tensor in chosen.items() if tensor is not None}
    scale_format = _scale_format(kept.values())
    rounded = {
        name: _round(checkpoint.tensors[name], weights, scale_format) for name in chosen if name not in kept
    }
    grouped = {name: (kept | rounded)[name] for name in chosen}
    meets_integers = _quantizes_activations(checkpoint.config)
    with_int8 = {
        name
        for name, tensor in grouped.items()
        if _is_int8_of_rows(tensor)
        and name not in matrices.float_activations
        and (weights == "w8a8" or (meets_integers and name in kept))
    }
    compressed = CompressedWeights(grouped, with_int8, scale_format)
    written: list[WrittenTensor] = []
    for name, tensor in checkpoint.tensors.items():
        if name in grouped:
            written += compressed.parts(name)
            continue
        stored_format = scale_format if tensor.format.block_elements > 1 else tensor.format
        conversion.note_floats(tensor, stored_format)
        written.append(floats(tensor, stored_format))
    others = (name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2)
    ignored = {name.removesuffix(WEIGHT) for name in others if name not in grouped} | {"lm_head"}
    write_folder(checkpoint, folder, written, scale_format, compressed.config(ignored))


def _keep(tensor: StoredTensor, weights: ConvertedWeights, conversion: Conversion) -> GroupedTensor | None:
    """The whole numbers that a matrix is kept as; None where it is rounded."""
    own = as_grouped(tensor)
    most_bits = 4 if weights.startswith("int4") else 8
    if own is not None and own.group_of_column is None and own.bits <= most_bits:
        kept = less_zeros(own)
        if kept is not None:
            why = f"those of {tensor.format.value}" if own is not tensor else ""
            conversion.note(f"kept exactly as {describe(kept)}", why or ("" if kept is own else _ZEROS_OFF))
            return kept
    form = weights if weights != "auto" else "int8" if is_float(tensor) else "int8:g32"
    why = "which compressed-tensors cannot hold" if weights == "auto" and not is_float(tensor) else ""
    conversion.note(f"rounded to {form} from {describe(tensor)}", why)
    return None


def _round(tensor: StoredTensor, weights: ConvertedWeights, scale_format: TensorFormat) -> GroupedTensor:
    bits = 4 if weights.startswith("int4") else 8
    fine = 0 if is_float(tensor) else _FINE_GROUP
    group_size = fine if weights == "auto" else _GROUP_SIZES[weights]
    return round_to_groups(tensor, bits=bits, group_size=group_size, scale_format=scale_format)


def _is_int8_of_rows(tensor: GroupedTensor) -> bool:
    return tensor.bits == 8 and tensor.group_size >= tensor.shape[1]


def _scale_format(kept: Iterable[GroupedTensor]) -> TensorFormat:
    """What holds the scales of all that is kept: their own format, or float32 where they have several."""
    formats = {tensor.format for tensor in kept}
    if not formats:
        return TensorFormat.BF16
    return formats.pop() if len(formats) == 1 else TensorFormat.F32


def _quantizes_activations(config: JsonObject) -> bool:
    """Whether the model as it is stored meets activations of int8."""
    quantization = config.get("quantization_config")
    groups = quantization.get("config_groups") if isinstance(quantization, dict) else None
    return isinstance(groups, dict) and any(
        isinstance(group, dict) and group.get("input_activations") for group in groups.values()
    )
