"""Calibration batches on their way through a graph: some nodes run, and what later ones read is kept,
in memory or on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from fastserve.backends.torch.ops import OPS
from fastserve.backends.torch.step import KvLayer, SequenceRows, Step
from fastserve.graph.node import Graph, Node, Parameter, PoolNode, Value

BATCH_TOKENS = 2048  # rows of a batch: products are large, and attention stays within short sequences


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Whole sequences end to end.

    Attributes:
        token_ids: [tokens]
        lengths: of each sequence.
    """

    token_ids: torch.Tensor
    lengths: tuple[int, ...]

    def step(
        self,
        nodes: Sequence[Node],
        weights: Mapping[Parameter, torch.Tensor],
        values: dict[Value, torch.Tensor],
    ) -> Step:
        """For nodes that run on the values so far; all rows are output rows."""
        num_tokens = len(self.token_ids)
        starts = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()
        return Step(
            weights=weights,
            kv={
                node.pool_layer: _empty_layer(num_tokens, node)
                for node in nodes
                if isinstance(node, PoolNode)
            },
            ids={
                "token_ids": self.token_ids,
                "positions": torch.cat([torch.arange(length) for length in self.lengths]),
                "token_types": torch.zeros_like(self.token_ids),
            },
            output_rows=torch.arange(num_tokens),
            sequences=tuple(SequenceRows(b, e, torch.arange(b, e)) for b, e in pairwise(starts)),
            values=values,
        )


def _empty_layer(num_tokens: int, node: PoolNode) -> KvLayer:
    keys, values = (torch.zeros(num_tokens, node.num_kv_heads, node.head_dim) for _ in range(2))
    return KvLayer(keys, values, "f32")


def make_batches(sequences: Sequence[Sequence[int]], *, num_tokens: int = BATCH_TOKENS) -> list[TokenBatch]:
    """Sequences in their order, as many as fit into `num_tokens` to a batch, and one at least.

    >>> [batch.lengths for batch in make_batches([[1, 2], [3], [4, 5, 6]], num_tokens=3)]
    [(2, 1), (3,)]
    """
    groups: list[list[Sequence[int]]] = []
    room = 0
    for sequence in sequences:
        if not groups or len(sequence) > room:
            groups.append([])
            room = num_tokens
        groups[-1].append(sequence)
        room -= len(sequence)
    return [
        TokenBatch(torch.tensor([i for ids in group for i in ids]), tuple(map(len, group)))
        for group in groups
    ]


def run_nodes(
    graph: Graph,
    begin: int,
    end: int,
    batch: TokenBatch,
    weights: Mapping[Parameter, torch.Tensor],
    values: dict[Value, torch.Tensor],
) -> None:
    """Run the nodes from `begin` up to `end` on values, in place: a value that no later node reads is dropped
    as soon as it has been read."""
    last_reads = _last_reads(graph)
    step = batch.step(graph.nodes[begin:end], weights, values)
    for position in range(begin, end):
        node = graph.nodes[position]
        OPS[type(node)](node, step)
        for value in [value for value in values if last_reads.get(value, -1) <= position]:
            del values[value]


def _last_reads(graph: Graph) -> dict[Value, int]:
    """The position of the last node that reads each value; the graph's outputs are read after all."""
    reads = {value: position for position, node in enumerate(graph.nodes) for value in node.inputs()}
    return reads | dict.fromkeys(graph.outputs.values(), len(graph.nodes))


class StateStore:
    """Values of each batch between two stations. Those that memory has no room for lie in files.

    Args:
        folder: for the files; made when the first is written.
        memory_bytes: that all values in memory may have together.
    """

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._in_memory: dict[int, dict[Value, torch.Tensor]] = {}
        self._on_disk: dict[int, dict[Value, Path]] = {}

    def put(self, index: int, values: Mapping[Value, torch.Tensor]) -> None:
        """Keep the values of a batch, which are taken with `take` once."""
        num_bytes = sum(value.nbytes for value in values.values())
        in_memory = sum(v.nbytes for kept in self._in_memory.values() for v in kept.values())
        if in_memory + num_bytes <= self._memory_bytes:
            self._in_memory[index] = dict(values)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        files = {value: self._folder / f"{index:05}-{value.index}.npy" for value in values}
        for value, file in files.items():
            np.save(file, values[value].contiguous().numpy())
        self._on_disk[index] = files

    def take(self, index: int) -> dict[Value, torch.Tensor]:
        """The values of a batch; of one that none were kept of, nothing."""
        if index in self._on_disk:
            files = self._on_disk.pop(index)
            values = {value: torch.from_numpy(np.load(file)) for value, file in files.items()}
            for file in files.values():
                file.unlink()
            return values
        return self._in_memory.pop(index, {})
