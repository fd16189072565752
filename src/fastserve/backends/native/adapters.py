"""The adapters of a native executable: matrices of each slot, packed as the plan's calls read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

import fastserve._native as _native
from fastserve.backends.adapter import AdapterSites, PlacedMatrices
from fastserve.backends.native.weight_scheme import PANEL, SCHEMES, WeightScheme
from fastserve.backends.native.weights import pack
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.graph.node import Graph, Linear, Parameter
from fastserve.graph.passes.add_adapters import max_rank_at
from fastserve.types import Float32Array, Limits, LowRankMatrices

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class _PackedMatrices:
    """Of one slot and weight. The table borrows them."""

    down: _native.Weight
    parts: list[tuple[int, int, _native.Weight, Float32Array | None, Float32Array | None]]


class NativeAdapters:
    """What adapters make of the results of a graph's linears, by slot; of an encoder-decoder, of both its
    graphs'.

    Their matrices are float32 beside float32 weights, else bfloat16, whose rounding is finer than that of the
    weights. They take memory as they are set, by the ranks that they have.
    """

    def __init__(
        self,
        runtime: _native.Runtime,
        graph: Graph,
        tensors: Mapping[str, StoredTensor],
        schemes: Mapping[Parameter, WeightScheme],
        limits: Limits,
    ) -> None:
        num_rows = {name: tensor.shape[0] for name, tensor in tensors.items() if tensor.shape}
        self._runtime = runtime
        self._sites = AdapterSites(graph, num_rows, limits)
        self._schemes = {weight: scheme_beside(schemes[weight]) for weight in self._sites.weights}
        self._packed: dict[tuple[Parameter, int], _PackedMatrices] = {}
        self.tables: dict[Parameter, _native.AdapterTable] = {}
        for weight in self._sites.weights:
            rows, depth = weight.shape
            max_ranks = self._sites.max_ranks[weight] * len(weight.names)
            self.tables[weight] = _native.AdapterTable(limits.num_adapter_slots, rows, depth, max_ranks)

    def set(self, slot: int, matrices: Mapping[str, LowRankMatrices] | None) -> None:
        """See `fastserve.types.Executable.set_adapter`."""
        placed = self._sites.place(slot, matrices or {})
        packed = {w: self._pack(p, self._schemes[w]) for w, p in placed.items() if p is not None}
        for weight, table in self.tables.items():
            if weight in packed:
                table.set(slot, packed[weight].down, packed[weight].parts)
                self._packed[weight, slot] = packed[weight]
            else:
                table.clear(slot)
                self._packed.pop((weight, slot), None)

    def _pack(self, placed: PlacedMatrices, scheme: WeightScheme) -> _PackedMatrices:
        parts = [
            (p.first_row, p.first_rank, self._pack_one(p.up, scheme), p.factors, p.shifts)
            for p in placed.parts
        ]
        return _PackedMatrices(self._pack_one(placed.down, scheme), parts)

    def _pack_one(self, matrix: Float32Array, scheme: WeightScheme) -> _native.Weight:
        data = np.ascontiguousarray(matrix, np.float32).reshape(-1).view(np.uint8)
        return pack(self._runtime, [StoredTensor("", TensorFormat.F32, matrix.shape, data)], scheme)


def scheme_beside(scheme: WeightScheme) -> WeightScheme:
    """How an adapter's matrices are packed beside a weight of this scheme."""
    return SCHEMES["f32" if scheme.format == "f32" else "bf16"]


def adapter_bytes(graph: Graph, schemes: Mapping[Parameter, WeightScheme], limits: Limits) -> int:
    """Memory of as many adapters as there are slots, if each changed every linear with the highest rank."""
    if not limits.num_adapter_slots:
        return 0
    linears = [node for node in graph.nodes if isinstance(node, Linear)]
    ranks = {node.weight: max_rank_at(node, limits.max_adapter_rank) for node in linears}
    total = 0
    for weight, rank in ranks.items():
        rows, depth = weight.shape
        scheme = scheme_beside(schemes[weight])
        total += scheme.num_bytes(rank * len(weight.names), depth)
        total += scheme.num_bytes(rows + PANEL * (len(weight.names) - 1), rank)
        total += 2 * _FLOAT_BYTES * rows  # factors and shifts
    return total * limits.num_adapter_slots
