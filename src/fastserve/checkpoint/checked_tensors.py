"""Tensors that are read as long as somebody wants them: a load of minutes can be given up within it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.tensor import StoredTensor

Check = Callable[[], None]


class CheckedTensors(Mapping[str, StoredTensor]):
    """The same tensors, with a check before each is handed out.

    Args:
        check: what it raises, reading raises.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], check: Check) -> None:
        self._tensors = tensors
        self._check = check

    def __getitem__(self, name: str) -> StoredTensor:
        self._check()
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def checked(checkpoint: Checkpoint, check: Check | None) -> Checkpoint:
    """A checkpoint whose tensors are checked so; itself where there is no check."""
    if check is None:
        return checkpoint
    return replace(checkpoint, tensors=CheckedTensors(checkpoint.tensors, check))
