"""What a batch may hold, by the graph and the limits it is compiled for: checked before a backend runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.errors import OptionError
from fastserve.graph.node import (
    Attention,
    CrossAttention,
    Embedding,
    Graph,
    IdSource,
    Node,
    StoreSource,
)
from fastserve.types import NO_ADAPTER, Batch, Int32Array, Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBounds:
    """Whatever indexes something in a batch stays below these; its counts stay at or below `limits`."""

    limits: Limits
    block_size: int  # tokens
    vocab_size: int
    num_positions: int
    num_token_types: int
    needs_whole_sequences: bool  # attention is bidirectional, or sources are stored
    reads_sources: bool = False  # it is a decoder of what an encoder has stored

    @classmethod
    def from_graph(cls, graph: Graph, limits: Limits, block_size: int) -> BatchBounds:
        sizes: dict[IdSource, int] = {
            node.ids: node.weight.shape[0] - node.offset
            for node in graph.nodes
            if isinstance(node, Embedding)
        }
        return cls(
            limits=limits,
            block_size=block_size,
            vocab_size=sizes["token_ids"],
            num_positions=min(limits.max_context, sizes.get("positions", limits.max_context)),
            num_token_types=sizes.get("token_types", 1),
            needs_whole_sequences=any(map(_needs_whole_sequences, graph.nodes)),
            reads_sources=any(isinstance(node, CrossAttention) for node in graph.nodes),
        )

    def check(self, batch: Batch) -> None:
        """Check a batch before it runs.

        Raises:
            OptionError: it is inconsistent or beyond a bound; the message names field, value and limit.
        """
        self._check_counts(batch)
        self._check_sequences(batch)
        _check_ids("token_ids", batch.token_ids, self.vocab_size)
        _check_ids("output_rows", batch.output_rows, batch.num_tokens)
        if batch.token_types is not None:
            _check_length("token_types", batch.token_types, batch.num_tokens)
            _check_ids("token_types", batch.token_types, self.num_token_types)
        if batch.adapter_slots is not None:
            _check_length("adapter_slots", batch.adapter_slots, batch.num_sequences)
            slots = batch.adapter_slots[batch.adapter_slots != NO_ADAPTER]
            _check_ids("adapter_slots", slots, self.limits.num_adapter_slots)

    def _check_counts(self, batch: Batch) -> None:
        for option, count in (
            ("max_tokens", batch.num_tokens),
            ("max_sequences", batch.num_sequences),
            ("max_outputs", len(batch.output_rows)),
        ):
            limit = getattr(self.limits, option)
            if count > limit:
                raise OptionError(
                    f"the batch has {count} {option.removeprefix('max_')}, the limit is {option}={limit}",
                    hint=f"split the batch, or compile with {option}={count}",
                )
        if not batch.num_tokens:
            raise OptionError("the batch has no tokens", hint="a step runs at least one")

    def _check_sequences(self, batch: Batch) -> None:
        _check_length("positions", batch.positions, batch.num_tokens)
        _check_length("sequence_starts", batch.sequence_starts, batch.num_sequences + 1)
        _check_length("block_tables", batch.block_tables, batch.num_sequences)
        starts, lengths = batch.sequence_starts, np.diff(batch.sequence_starts)
        if starts[0] != 0 or starts[-1] != batch.num_tokens or (lengths < 1).any():
            raise OptionError(f"sequence_starts={starts.tolist()} must rise from 0 to {batch.num_tokens}")
        firsts = batch.context_lengths - lengths  # position of each sequence's first row
        expected = np.arange(batch.num_tokens) + np.repeat(firsts - starts[:-1], lengths)
        if not np.array_equal(batch.positions, expected):
            raise OptionError("positions must be the last of each sequence's context_lengths, in order")
        if self.needs_whole_sequences and firsts.any():
            raise OptionError(
                f"a sequence has {firsts.max()} tokens outside the batch",
                hint="bidirectional attention needs the whole sequence in one batch",
            )
        _check_ids("positions", batch.positions, self.num_positions)
        self._check_blocks("block_tables", batch.block_tables, batch.context_lengths)
        self._check_sources(batch)

    def _check_sources(self, batch: Batch) -> None:
        lengths, tables = batch.source_lengths, batch.source_block_tables
        if not self.reads_sources:
            if lengths is not None or tables is not None:
                raise OptionError("the batch has sources, which this model does not read")
            return
        if lengths is None or tables is None:
            raise OptionError("the batch has no sources, which this model reads")
        _check_length("source_lengths", lengths, batch.num_sequences)
        _check_length("source_block_tables", tables, batch.num_sequences)
        if lengths.min() < 1 or lengths.max() > self.limits.max_context:
            raise OptionError(
                f"source_lengths={lengths.tolist()} must be from 1 to max_context={self.limits.max_context}"
            )
        self._check_blocks("source_block_tables", tables, lengths)

    def _check_blocks(self, name: str, tables: Int32Array, lengths: Int32Array) -> None:
        needed = -(-lengths // self.block_size)
        width = tables.shape[1]
        if needed.max() > width:
            raise OptionError(f"{name} has {width} columns, the longest sequence needs {needed.max()}")
        used = np.arange(width) < needed[:, None]
        _check_ids(name, tables[used], self.limits.num_blocks)


def _needs_whole_sequences(node: Node) -> bool:
    return isinstance(node, StoreSource) or (isinstance(node, Attention) and not node.causal)


def _check_ids(name: str, ids: NDArray[np.integer[Any]], limit: int) -> None:
    if len(ids) and not 0 <= (low := ids.min()) <= (high := ids.max()) < limit:
        raise OptionError(f"{name} holds {low if low < 0 else high}, outside 0..{limit - 1}")


def _check_length(name: str, array: NDArray[Any], length: int) -> None:
    if len(array) != length:
        raise OptionError(f"{name} has {len(array)} entries, not {length}")
