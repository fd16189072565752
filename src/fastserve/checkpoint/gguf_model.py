"""The tensors of a GGUF file under their Hugging Face names, arranged as they are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fastserve.checkpoint.gguf import GgufFile
from fastserve.checkpoint.gguf_arrangement import change_back
from fastserve.checkpoint.gguf_config import ROPE_TENSORS
from fastserve.checkpoint.gguf_modules import find_name
from fastserve.checkpoint.tensor import StoredTensor
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.types import JsonObject


class HfTensors(Mapping[str, StoredTensor]):
    """The tensors of a GGUF file under their Hugging Face names.

    Conversion to GGUF moves some of them about (`gguf_arrangement`); they come back as they were. All others
    are views of the mapped file.
    """

    def __init__(self, file: GgufFile, config: JsonObject) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for name, tensor in file.tensors.items():
            if name not in ROPE_TENSORS:
                self._tensors |= _renamed(hf_name(file, config, name), tensor)
        self._changed: dict[str, StoredTensor] = {}
        for name, tensor in self._tensors.items():
            change = change_back(name, config)
            if change is None:
                continue
            try:
                self._changed[name] = change(tensor)
            except CheckpointError as error:
                raise CheckpointError(f"{file.path}: {error.message}") from error

    def __getitem__(self, name: str) -> StoredTensor:
        changed = self._changed.get(name)
        return self._tensors[name] if changed is None else changed

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _renamed(name: str, tensor: StoredTensor) -> dict[str, StoredTensor]:
    """A tensor under its Hugging Face name, or the matrices of all experts that it holds under theirs."""
    if "{}" in name:
        count, *shape = tensor.shape
        size = tensor.format.num_bytes(tuple(shape))
        return {
            (own := name.format(index)): StoredTensor(
                own, tensor.format, tuple(shape), tensor.data[index * size : (index + 1) * size]
            )
            for index in range(count)
        }
    if name.endswith("shared_expert_gate.weight") and len(tensor.shape) == 1:
        return {name: StoredTensor(name, tensor.format, (1, *tensor.shape), tensor.data)}
    return {name: replace(tensor, name=name)}


def hf_name(file: GgufFile, config: JsonObject, name: str) -> str:
    """The Hugging Face name of a GGUF tensor; with {} in place of the index where it holds all experts.

    Raises:
        UnsupportedError: the architecture has no such tensor in the variations that we have.
    """
    if (found := find_name(config, name)) is not None:
        return found
    raise UnsupportedError(
        f"{file.path}: tensor {name!r} is unknown for architecture {file.architecture!r}",
        hint="variations for images and sound are not supported",
    )
