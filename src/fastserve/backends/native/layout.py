"""What the native backend makes of a graph before it reads a weight: its nodes, their chains, where values
lie. The memory of a model is reckoned from it, and the model compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastserve.backends.native.chains import Chain, find_chains
from fastserve.backends.native.fuse import fuse
from fastserve.backends.native.weight_scheme import WeightScheme
from fastserve.graph.memory import MemoryPlan, plan_memory, rows_of
from fastserve.graph.node import Graph, Parameter, Rows
from fastserve.graph.passes import add_adapters
from fastserve.types import Limits


@dataclass(frozen=True, slots=True)
class Layout:
    """
    Attributes:
        source: the optimized graph that was laid out.
        schemes: how its matrices are packed.
        graph: `source` in the nodes that the native backend runs.
        rows: of the largest step that there is room for.
        memory: the places of the values in the arena.
        adapted: the same with adapters, for steps that have some; None where the limits allow for none.
    """

    source: Graph
    schemes: Mapping[Parameter, WeightScheme]
    graph: Graph
    rows: Mapping[Rows, int]
    chains: Sequence[Chain]
    memory: MemoryPlan
    adapted: Layout | None = None

    def is_for(self, limits: Limits) -> bool:
        """Whether it has room for just the largest step within these limits."""
        return self.rows == rows_of(limits)

    def num_bytes(self, threads: int) -> int:
        """Memory of all values, and of the strips of so many threads."""
        own_bytes = self.memory.size_bytes + threads * max(
            (chain.strip.size_bytes for chain in self.chains), default=0
        )
        return own_bytes + (self.adapted.num_bytes(threads) if self.adapted else 0)


def lay_out(
    graph: Graph, schemes: Mapping[Parameter, WeightScheme], limits: Limits, *, in_strips: bool = True
) -> Layout:
    """Lay out an optimized graph. `in_strips=False` takes all rows through one call after the other."""

    def group_size_of(matrix: Parameter) -> int | None:
        """Columns of its activations that share a scale (0: all); None where they stay floats."""
        scheme = schemes[matrix]
        return scheme.activation_group_size if scheme.is_integer else None

    fused = fuse(graph, group_size_of)
    chains = find_chains(fused) if in_strips else []
    rows = rows_of(limits)
    memory = plan_memory(fused, rows, chains=[chain.nodes for chain in chains])
    adapted = None
    if limits.num_adapter_slots:
        plain = replace(limits, num_adapter_slots=0)
        adapted = lay_out(add_adapters(graph, limits.max_adapter_rank), schemes, plain, in_strips=in_strips)
    return Layout(graph, schemes, fused, rows, chains, memory, adapted)
