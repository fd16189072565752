"""Layer groups: matrices that a search treats alike, and which of a model's tensors can be exchanged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.compress.step import Targets, WorkingModel
from fastserve.models.matrices import find_matrices

_BLOCK = re.compile(r"\.(\d+)\.")
_DEPTHS = ("early", "middle", "late")


@dataclass(frozen=True, slots=True)
class Group:
    """`early attention`, ..., `tables`."""

    name: str
    matrices: tuple[str, ...]


def find_groups(model: WorkingModel) -> tuple[Group, ...]:
    """Attention and feed-forward matrices of a third of the blocks each, those outside of blocks, and tables.
    Matrices that are multiplied at once, such as those of queries, keys and values, are never apart.
    """
    found: dict[str, list[str]] = {}
    tables = find_matrices(model.checkpoint).tables
    names = model.matrices(Targets(linears=True, tables=True))
    blocks = [int(match[1]) for name in names if (match := _BLOCK.search(name))]
    count = max(blocks, default=0) + 1
    for name in names:
        block = _BLOCK.search(name)
        if name in tables:
            group = "tables"
        elif block is None:
            group = "other"
        else:
            depth = _DEPTHS[min(3 * int(block[1]) // count, 2)]
            kind = "attention" if "attention" in name or "attn" in name else "feed-forward"
            group = f"{depth} {kind}"
        found.setdefault(group, []).append(name)
    return tuple(Group(name, tuple(matrices)) for name, matrices in found.items())


def can_exchange(source: Checkpoint, other: Checkpoint, groups: Sequence[Group]) -> bool:
    """Whether matrices of one may stand among those of the other: all else is the same."""
    matrices = {name for group in groups for name in group.matrices}
    if source.tensors.keys() != other.tensors.keys():
        return False
    return all(
        tensor.shape == other.tensors[name].shape
        and (name in matrices or np.array_equal(tensor.data, other.tensors[name].data))
        for name, tensor in source.tensors.items()
    )


def mix(
    source: WorkingModel,
    made: Mapping[str, Checkpoint],
    groups: Sequence[Group],
    chosen: Sequence[str | None],
) -> WorkingModel:
    """A model whose groups are, in order, those of the models of these names; None leaves the source's."""
    changed = {
        name: made[recipe].tensors[name]
        for group, recipe in zip(groups, chosen, strict=True)
        if recipe is not None
        for name in group.matrices
    }
    return source.with_tensors(changed)
