"""Writes a working model as a model directory, and reads it again to see that it is what was meant."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.compressed_tensors_writer import WEIGHT, CompressedWeights
from fastserve.checkpoint.conversion import Matrices, describe
from fastserve.checkpoint.convert import to_f32, to_float_format
from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.packed_weights import packed_config, write_packed
from fastserve.checkpoint.rounding import row_pieces
from fastserve.checkpoint.safetensors_writer import floats
from fastserve.checkpoint.tensor import ComputedTensor, StoredTensor, TensorFormat
from fastserve.checkpoint.to_safetensors import write_folder
from fastserve.compress.step import WorkingModel
from fastserve.errors import CheckpointError, OptionError
from fastserve.hub.disk import flush_to_disk
from fastserve.models.matrices import find_matrices
from fastserve.types import JsonObject

Form = Literal["safetensors", "compressed-tensors", "fastserve"]

SETTINGS_FILE = "fastserve.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class TensorSize:
    """What one tensor is on the disk.

    Attributes:
        stored: `int4 in groups of 64`, `f32`, ...
        num_zeros: elements that are exactly 0, of matrices that are pruned or whole numbers; else None.
    """

    stored: str
    num_elements: int
    num_bytes: int
    num_zeros: int | None = None

    @property
    def sparsity(self) -> float | None:
        return None if self.num_zeros is None else self.num_zeros / max(self.num_elements, 1)


@dataclass(frozen=True, slots=True)
class ArtifactSizes:
    """What a model directory weighs.

    Attributes:
        form: of the weights: plain numbers, compressed-tensors, or the sidecar of `packed_weights`.
        weight_bytes: of all files of weights, headers included.
        total_bytes: of all files.
        expanded_bytes: of the weights where sidecar's are used densely (3 and 2 bits as 4).
        tensors: by name.
    """

    form: Form
    weight_bytes: int
    total_bytes: int
    expanded_bytes: int
    tensors: Mapping[str, TensorSize]

    def to_json(self) -> JsonObject:
        return {**asdict(self), "tensors": {name: asdict(size) for name, size in self.tensors.items()}}


def write_artifact(model: WorkingModel, output: Path, card: JsonObject) -> ArtifactSizes:
    """Write a model into the folder `output`, which appears whole and checked, or not at all.

    Whole numbers go to compressed-tensors, which transformers and vLLM open, where that holds all of them
    and no zeros are worth leaving out; else to the sidecar. Tensors in blocks of GGUF that no step has
    changed become bfloat16. `card` is what `fastserve.json` says besides what the source's did.

    Raises:
        OptionError: `output` is there already.
        CheckpointError: what was written is not read again as it was meant.
        OSError: it cannot be written.
    """
    if output.exists():
        raise OptionError(
            f"output: {output} is there already", hint="name another folder, or remove it", option="output"
        )
    settled = settle(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        sizes = _write(settled, folder)
        write_settings(folder, {**settled.checkpoint.card, **card})
        check_artifact(settled, folder)
        publish(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return replace(sizes, total_bytes=folder_bytes(output))


def settle(model: WorkingModel) -> WorkingModel:
    """The model with the numbers that it has once it is stored: what is left in blocks becomes bfloat16."""
    changed = {
        name: _as_bf16(tensor)
        for name, tensor in model.tensors.items()
        if tensor.format.block_elements > 1 and not isinstance(tensor, GroupedTensor)
    }
    return model.with_tensors(changed) if changed else model


def write_settings(folder: Path, card: JsonObject) -> None:
    """Write `fastserve.json`, in place of what is there."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **card}, ensure_ascii=False, indent=2)
    (folder / SETTINGS_FILE).write_text(f"{text}\n", encoding="utf-8")


def publish(folder: Path, output: Path) -> None:
    """Give a folder its name, all of it on the disk before."""
    flush_to_disk([*folder.rglob("*"), folder])
    folder.chmod(0o755)
    folder.rename(output)


def folder_bytes(path: Path) -> int:
    """Of all files of a model: a folder, or a file."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def check_artifact(model: WorkingModel, folder: Path) -> None:
    """Read a folder again, and hold every number and file to the model that was to be written.

    Raises:
        CheckpointError: a tensor is missing, or has another type, shape, zero or value; the first is named.
    """
    read = open_checkpoint(folder)
    if read.tensors.keys() != model.tensors.keys():
        names = sorted(read.tensors.keys() ^ model.tensors.keys())
        raise _differs(folder, names[0], "is missing or was never meant")
    for name, meant in model.tensors.items():
        found = read.tensors[name]
        if found.shape != meant.shape or describe(found) != describe(meant) or found.format != meant.format:
            was, is_ = (f"{describe(t)} {list(t.shape)} ({t.format.value})" for t in (meant, found))
            raise _differs(folder, name, f"is {is_}, {was} was written")
        for piece in row_pieces(meant.shape) if meant.shape else [(0, 1)]:
            if not _same(meant, found, *piece):
                raise _differs(folder, name, f"has other numbers in rows {piece[0]} to {piece[1] - 1}")


def _same(meant: StoredTensor, found: StoredTensor, begin: int, end: int) -> bool:
    """Whether rows are the same, bit by bit."""
    if not (isinstance(meant, GroupedTensor) and isinstance(found, GroupedTensor)):
        if not meant.shape:
            return np.array_equal(meant.data, found.data)
        return np.array_equal(meant.rows(begin, end).data, found.rows(begin, end).data)
    one, other = meant.groups(begin, end), found.groups(begin, end)
    if (one.zeros is None) != (other.zeros is None):
        return False
    is_zero_same = one.zeros is None or other.zeros is None or np.array_equal(one.zeros, other.zeros)
    return (
        is_zero_same and np.array_equal(one.codes, other.codes) and np.array_equal(one.scales, other.scales)
    )


def _differs(folder: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} was not written as it was meant: {name} {what}",
        hint="the disk may be failing; if it happens again, report it as a defect of fastserve",
    )


def _as_bf16(tensor: StoredTensor) -> StoredTensor:
    def compute(begin: int, end: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return to_float_format(to_f32(tensor.rows(begin, end)), TensorFormat.BF16)

    return ComputedTensor(tensor.name, TensorFormat.BF16, tensor.shape, compute)


def _write(model: WorkingModel, folder: Path) -> ArtifactSizes:
    grouped = {n: tensor for n, tensor in model.tensors.items() if isinstance(tensor, GroupedTensor)}
    matrices = find_matrices(model.checkpoint)
    zeros = {name: _count_zeros(tensor) for name, tensor in model.tensors.items() if len(tensor.shape) == 2}
    form = _choose_form(grouped, zeros, matrices)
    others = [floats(tensor, tensor.format) for name, tensor in model.tensors.items() if name not in grouped]
    checkpoint = model.checkpoint
    if form == "fastserve":
        write_folder(checkpoint, folder, others, _dtype(model, grouped), packed_config())
        packed = write_packed(folder, grouped)
        sizes = {weight.name: weight.file_bytes for weight in packed.weights}
        saved = sum(weight.expanded_bytes - weight.file_bytes for weight in packed.weights)
    elif form == "compressed-tensors":
        scale_format = _scale_format(grouped)
        compressed = CompressedWeights(grouped, model.int8_activations & grouped.keys(), scale_format)
        parts = {name: compressed.parts(name) for name in grouped}
        written = [*others, *(part for several in parts.values() for part in several)]
        ignored = {
            name.removesuffix(WEIGHT)
            for name, tensor in model.tensors.items()
            if len(tensor.shape) == 2 and name not in grouped
        }
        write_folder(checkpoint, folder, written, scale_format, compressed.config(ignored | {"lm_head"}))
        sizes = {name: sum(part.num_bytes for part in several) for name, several in parts.items()}
        saved = 0
    else:
        write_folder(checkpoint, folder, others, _dtype(model, grouped), None)
        sizes, saved = {}, 0
    sizes |= {part.name: part.num_bytes for part in others}
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    tensors = {
        name: TensorSize(
            stored=describe(tensor),
            num_elements=int(np.prod(tensor.shape, dtype=np.int64)),
            num_bytes=sizes[name],
            num_zeros=zeros.get(name),
        )
        for name, tensor in model.tensors.items()
    }
    return ArtifactSizes(form, weight_bytes, folder_bytes(folder), weight_bytes + saved, tensors)


_LEAST_SAVING = 0.1  # for which transformers is given up; rounding to 4 bits alone makes some zeros


def _choose_form(grouped: Mapping[str, GroupedTensor], zeros: Mapping[str, int], matrices: Matrices) -> Form:
    if not grouped:
        return "safetensors"
    if not all(_fits(name, tensor, matrices) for name, tensor in grouped.items()):
        return "fastserve"
    bits = sum(int(np.prod(tensor.shape)) * tensor.bits for tensor in grouped.values())
    behind_masks = sum(
        int(np.prod(tensor.shape)) * (tensor.bits + 1) - zeros[name] * tensor.bits
        for name, tensor in grouped.items()
    )
    return "fastserve" if behind_masks < (1 - _LEAST_SAVING) * bits else "compressed-tensors"


def _fits(name: str, tensor: GroupedTensor, matrices: Matrices) -> bool:
    """Whether compressed-tensors, as transformers reads them, hold a matrix."""
    is_linear = name in matrices.linears and name.endswith(WEIGHT)
    has_groups = tensor.group_size >= tensor.shape[1] or tensor.shape[1] % tensor.group_size == 0
    return (
        is_linear
        and has_groups
        and tensor.bits in (4, 8)
        and tensor.group_of_column is None
        and not tensor.has_zeros()
    )


def _count_zeros(tensor: StoredTensor) -> int:
    """Elements that stand for exactly 0."""
    count = 0
    for begin, end in row_pieces(tensor.shape):
        if isinstance(tensor, GroupedTensor):
            codes, zeros, _ = tensor.groups(begin, end)
            count += int((codes == (0 if zeros is None else zeros[:, tensor.column_groups()])).sum())
        else:
            count += int((to_f32(tensor.rows(begin, end)) == 0).sum())
    return count


def _scale_format(grouped: Mapping[str, GroupedTensor]) -> TensorFormat:
    """What holds all scales exactly: their own format, or float32 where they have several."""
    formats = {tensor.format for tensor in grouped.values()}
    return formats.pop() if len(formats) == 1 else TensorFormat.F32


def _dtype(model: WorkingModel, grouped: Mapping[str, GroupedTensor]) -> TensorFormat:
    """What a model computes with elsewhere: the format of its largest tensor of floats."""
    others = [tensor for name, tensor in model.tensors.items() if name not in grouped]
    if not others:
        return TensorFormat.BF16
    return max(others, key=lambda tensor: int(np.prod(tensor.shape, dtype=np.int64))).format
