"""What a graph needs of a checkpoint, and whether the checkpoint has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fastserve.errors import CheckpointError
from fastserve.graph.node import Graph

MAX_NAMED = 5  # tensors named in one message


class HasShape(Protocol):
    """A stored tensor or an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def expected_parameters(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Every tensor that a graph reads, with its shape. The graph must be unmerged, as its family built it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        for parameter in node.parameters():
            assert len(parameter.names) == 1, f"{parameter.names} are merged: ask before optimizing the graph"
            (name,) = parameter.names
            assert shapes.setdefault(name, parameter.shape) == parameter.shape, f"{name} has two shapes"
    return shapes


def check_parameters(graph: Graph, tensors: Mapping[str, HasShape]) -> tuple[str, ...]:
    """Check that a checkpoint has every tensor that the graph reads, in its shape.

    Returns the names of the tensors that the graph does not read, for the caller to log.

    Raises:
        CheckpointError: tensors are missing or of the wrong shape; one message tells of both.
    """
    expected = expected_parameters(graph)
    missing = tuple(name for name in expected if name not in tensors)
    misshapen = tuple(
        f"{name} ({list(tensors[name].shape)}, not {list(shape)})"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    )
    unused = tuple(name for name in tensors if name not in expected)
    if missing or misshapen:
        kinds = (("missing", missing), ("of the wrong shape", misshapen), ("not used", unused))
        findings = [f"{_count(items)} {kind}: {_abbreviate(items)}" for kind, items in kinds if items]
        raise CheckpointError(
            f"the checkpoint does not fit its config; {'; '.join(findings)}",
            hint="take the model from its source again, config and weights together",
        )
    return unused


def _count(items: tuple[str, ...]) -> str:
    return "1 tensor is" if len(items) == 1 else f"{len(items)} tensors are"


def _abbreviate(items: tuple[str, ...]) -> str:
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more
