"""What a graph needs of a checkpoint, and whether the checkpoint has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fastserve.errors import CheckpointError
from fastserve.graph.node import Graph

MAX_NAMED = 5  # tensors named in one message


class HasShape(Protocol):
    """A stored tensor or an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class ParameterReport:
    """How a checkpoint's tensors compare to what a graph needs."""

    missing: tuple[str, ...]
    wrong_shapes: tuple[str, ...]  # "name is [2, 3], not [3, 2]"
    unused: tuple[str, ...]


def expected_parameters(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Every tensor that a graph reads, with its shape. The graph must be unmerged, as its family built it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        for parameter in node.parameters():
            assert len(parameter.names) == 1, f"{parameter.names} are merged: ask before optimizing the graph"
            (name,) = parameter.names
            assert shapes.setdefault(name, parameter.shape) == parameter.shape, f"{name} has two shapes"
    return shapes


def compare_parameters(graph: Graph, tensors: Mapping[str, HasShape]) -> ParameterReport:
    """Compare the graph's needs with a checkpoint's tensors, by name and shape."""
    expected = expected_parameters(graph)
    return ParameterReport(
        missing=tuple(name for name in expected if name not in tensors),
        wrong_shapes=tuple(
            f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ),
        unused=tuple(name for name in tensors if name not in expected),
    )


def check_parameters(graph: Graph, tensors: Mapping[str, HasShape]) -> tuple[str, ...]:
    """Check that a checkpoint has every tensor that the graph reads, in its shape.

    Returns the names of the tensors that the graph does not read, for the caller to log.

    Raises:
        CheckpointError: tensors are missing or of the wrong shape; one message tells of both.
    """
    report = compare_parameters(graph, tensors)
    problems = []
    if report.missing:
        problems.append(f"{len(report.missing)} tensors are missing: {_abbreviate(report.missing)}")
    if report.wrong_shapes:
        problems.append(
            f"{len(report.wrong_shapes)} have the wrong shape: {_abbreviate(report.wrong_shapes)}"
        )
    if problems:
        if report.unused:
            problems.append(f"{len(report.unused)} are not used: {_abbreviate(report.unused)}")
        raise CheckpointError(
            f"the checkpoint does not fit its config: {'; '.join(problems)}",
            hint="take the model from its source again, config and weights together",
        )
    return report.unused


def _abbreviate(items: tuple[str, ...]) -> str:
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more
