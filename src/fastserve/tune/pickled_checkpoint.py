"""Opens pickled weights through PyTorch's loader of weights alone, which runs nothing that is in the file."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.checkpoint.checkpoint import Checkpoint, open_folder
from fastserve.checkpoint.file import read_json
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import CheckpointError, UnsupportedError

_WHOLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"
# As the first exports of BERT named parts of their norms.
_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def open_pickled(folder: Path) -> Checkpoint:
    """Open a Hugging Face folder with pytorch_model.bin, whole or in shards.

    Raises:
        UnsupportedError: PyTorch is not installed, or a tensor is of a type that we do not have.
        CheckpointError: files are missing or damaged, or hold something else than tensors.
    """
    return open_folder(folder, lambda _: _read_tensors(folder))


def _read_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in _files(folder):
        for name, tensor in _load(path).items():
            if name.endswith(".position_ids"):  # a constant that old exports stored: models compute it
                continue
            for old, new in _RENAMED.items():
                name = name.removesuffix(old) + new if name.endswith(old) else name
            tensors[name] = _to_stored(path, name, tensor)
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{folder / _INDEX}: weight_map is missing or does not map tensors to file names"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{folder / _INDEX}: shard {name!r} is not the name of a file beside the index"
            )
    return [folder / name for name in names]


def _load(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(
            f"{path} is a pickle, which PyTorch opens: {error}", hint="pip install 'fastserve-llm[tune]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of pickles that the loader does not know, and refuses
            # Old files are no archives and cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        OSError,
        TypeError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} holds something else than tensors, or is damaged: {reason:.200}",
            hint="take the model from a source that has safetensors",
        ) from error
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, no tensors by name")
    return loaded


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _to_stored(path: Path, name: str, tensor: Any) -> StoredTensor:
    import torch

    formats = {
        torch.float32: TensorFormat.F32,
        torch.float16: TensorFormat.F16,
        torch.bfloat16: TensorFormat.BF16,
    }
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        raise CheckpointError(f"{path}: {name!r} is no tensor but a {type(tensor).__name__}")
    if tensor.dtype not in formats:
        raise UnsupportedError(
            f"{path}: tensor {name!r} has element type {tensor.dtype}, supported are floats"
        )
    data = tensor.detach().contiguous().view(torch.uint8).reshape(-1).numpy()
    return StoredTensor(name, formats[tensor.dtype], tuple(tensor.shape), data)
