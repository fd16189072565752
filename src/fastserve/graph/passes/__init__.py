"""Passes are pure functions from graph to graph that leave every output unchanged."""

from __future__ import annotations

from fastserve.graph.node import Graph
from fastserve.graph.passes.add_adapters import add_adapters
from fastserve.graph.passes.drop_dead_nodes import drop_dead_nodes
from fastserve.graph.passes.fuse_add_norm import fuse_add_norm
from fastserve.graph.passes.hoist_gather_rows import hoist_gather_rows
from fastserve.graph.passes.leave_slots_empty import leave_slots_empty
from fastserve.graph.passes.merge_linears import merge_linears

__all__ = [
    "add_adapters",
    "drop_dead_nodes",
    "fuse_add_norm",
    "hoist_gather_rows",
    "leave_slots_empty",
    "merge_linears",
    "optimize",
]


def optimize(graph: Graph) -> Graph:
    """Apply every pass.

    Dead nodes go first, so that no pass counts them as readers. Rows are gathered before linears are merged,
    because linears merge only where their rows are the same; both leave adds and norms alone, so fusion comes
    last. `add_adapters` is no part of this: it makes a second graph of the one that this gives; nor is
    `leave_slots_empty`, which is for models with a prefix.
    """
    for apply in (drop_dead_nodes, hoist_gather_rows, merge_linears, fuse_add_norm):
        graph = apply(graph)
    return graph
