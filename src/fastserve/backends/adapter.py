"""The matrices of an adapter, put where a graph's linears want them: what all backends share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastserve.errors import OptionError
from fastserve.graph.node import Graph, Linear, Parameter
from fastserve.graph.passes.add_adapters import max_rank_at
from fastserve.types import Float32Array, Limits, LowRankMatrices


@dataclass(frozen=True, slots=True)
class AddedRows:
    """What is made of the rows of one part of a stacked weight: factors * them + shifts + `up` [rows, rank]
    times its ranks of what `down` gives."""

    first_row: int
    first_rank: int
    up: Float32Array
    factors: Float32Array | None
    shifts: Float32Array | None


@dataclass(frozen=True, slots=True)
class PlacedMatrices:
    """All that an adapter adds to one linear, whose weight may be several stacked. `down` [ranks, in] are
    those of its parts, one below the other."""

    down: Float32Array
    parts: tuple[AddedRows, ...]


class AdapterSites:
    """The linears of a graph that adapters may change, and how many rows each part of their weights has.

    >>> from fastserve.graph.builder import GraphBuilder
    >>> b = GraphBuilder()
    >>> x = b.embedding("token_ids", "embed.weight", size=2, width=3)
    >>> sites = AdapterSites(b.finish(y=b.linear(x, "a.weight", width=4)), {"a.weight": 4}, Limits())
    >>> [site.names for site in sites.weights]
    [('a.weight',)]
    """

    def __init__(self, graph: Graph, num_rows: Mapping[str, int], limits: Limits) -> None:
        linears = [node for node in graph.nodes if isinstance(node, Linear)]
        self.weights = tuple(dict.fromkeys(node.weight for node in linears))
        self.max_ranks = {node.weight: max_rank_at(node, limits.max_adapter_rank) for node in linears}
        self._num_rows = num_rows
        self._limits = limits

    def place(
        self, slot: int, matrices: Mapping[str, LowRankMatrices]
    ) -> dict[Parameter, PlacedMatrices | None]:
        """What an adapter adds to each linear; None where that is nothing. Raises as
        `Executable.set_adapter`."""
        self.check_slot(slot)
        known = {name for weight in self.weights for name in weight.names}
        unknown = [name for name in matrices if name not in known]
        if unknown:
            raise OptionError(f"an adapter changes {unknown[0]}, which is no linear of the model")
        return {weight: self._place(weight, matrices) for weight in self.weights}

    def check_slot(self, slot: int) -> None:
        if not 0 <= slot < self._limits.num_adapter_slots:
            raise OptionError(f"the adapter slot {slot} is outside 0..{self._limits.num_adapter_slots - 1}")

    def _place(self, weight: Parameter, matrices: Mapping[str, LowRankMatrices]) -> PlacedMatrices | None:
        downs: list[Float32Array] = []
        parts: list[AddedRows] = []
        first_row = first_rank = 0
        for name in weight.names:
            num_rows = self._num_rows[name]
            if name in matrices:
                added = matrices[name]
                self._check_shape(name, added, num_rows, weight)
                downs.append(added.down)
                parts.append(AddedRows(first_row, first_rank, added.up, added.factors, added.shifts))
                first_rank += len(added.down)
            first_row += num_rows
        return PlacedMatrices(np.concatenate(downs), tuple(parts)) if parts else None

    def _check_shape(self, name: str, added: LowRankMatrices, rows: int, weight: Parameter) -> None:
        rank, columns = len(added.down), weight.shape[1]
        if added.down.shape != (rank, columns) or added.up.shape != (rows, rank):
            shapes = f"{list(added.up.shape)} and {list(added.down.shape)}"
            raise OptionError(f"an adapter's matrices for {name} [{rows}, {columns}] have shapes {shapes}")
        if (added.factors is None) != (added.shifts is None) or any(
            vector is not None and vector.shape != (rows,) for vector in (added.factors, added.shifts)
        ):
            raise OptionError(f"an adapter's factors and shifts for {name} are not {rows} each")
        if not 1 <= rank <= self.max_ranks[weight]:
            raise OptionError(
                f"an adapter's rank for {name} is {rank}, the limit is max_adapter_rank="
                f"{self.max_ranks[weight]}"
            )
