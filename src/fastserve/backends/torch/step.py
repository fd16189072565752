"""The state of one step while its nodes run: the batch as tensors, the values so far, weights and KV pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fastserve.config import KvDtype
from fastserve.graph.node import IdSource, Parameter, Rows, Value
from fastserve.types import NO_ADAPTER, Batch, Int32Array

_SMALLEST_QUANTIZED = 1e-30  # what is smaller becomes zeros: the inverse of its scale would overflow

# int8 keeps what its integers and scales come to.
_STORED_AS: Mapping[KvDtype, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
}


@dataclass(frozen=True, slots=True)
class KvLayer:
    """Keys and values of one attention layer; slot `block * block_size + offset` is a row."""

    keys: torch.Tensor  # [slots, num_kv_heads, head_dim]
    values: torch.Tensor  # [slots, num_kv_heads, head_dim]
    dtype: KvDtype

    @classmethod
    def zeros(cls, shape: tuple[int, int, int], dtype: KvDtype, device: str) -> KvLayer:
        keys, values = torch.zeros(2, *shape, dtype=_STORED_AS[dtype], device=device)
        return cls(keys, values, dtype)

    def store(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the keys and values [tokens, num_kv_heads, head_dim] of some slots [tokens]."""
        self.keys[slots] = self._round(keys).to(self.keys.dtype)
        self.values[slots] = self._round(values).to(self.values.dtype)

    def block(self, index: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The bytes of a block's keys, and those of its values: flat views."""
        slots = slice(index * block_size, (index + 1) * block_size)
        return self.keys[slots].view(torch.uint8).view(-1), self.values[slots].view(torch.uint8).view(-1)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        """What is read back of x; int8 has a scale for each token and head."""
        if self.dtype != "int8":
            return x
        largest = x.abs().amax(dim=2, keepdim=True)
        inverse = torch.where(largest > _SMALLEST_QUANTIZED, 127 / largest, 0)
        return (x * inverse).round() * (largest / 127)


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """One sequence of the batch: its rows start:stop, and the pool's slots of its whole context."""

    start: int
    stop: int
    slots: torch.Tensor  # [context length]
    source_slots: torch.Tensor | None = None  # [source length]

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class AddedRows:
    """See `fastserve.backends.adapter.AddedRows`."""

    first_row: int
    first_rank: int
    up: torch.Tensor  # [rows, rank]
    factors: torch.Tensor | None  # [rows]
    shifts: torch.Tensor | None  # [rows]


@dataclass(frozen=True, slots=True)
class PlacedMatrices:
    """See `fastserve.backends.adapter.PlacedMatrices`."""

    down: torch.Tensor  # [ranks, in]
    parts: tuple[AddedRows, ...]


Adapters = Mapping[Parameter, Sequence[PlacedMatrices | None]]
"""By weight and slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a node's function reads, and where it puts its result (`values`)."""

    weights: Mapping[Parameter, torch.Tensor]
    kv: Mapping[int, KvLayer]  # by layer_index
    ids: Mapping[IdSource, torch.Tensor]  # [tokens]
    output_rows: torch.Tensor
    sequences: tuple[SequenceRows, ...]
    adapters: Adapters = field(default_factory=dict)
    rows_of_slots: Mapping[Rows, Mapping[int, torch.Tensor]] = field(default_factory=dict)
    values: dict[Value, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_batch(
        cls,
        batch: Batch,
        *,
        weights: Mapping[Parameter, torch.Tensor],
        kv: Mapping[int, KvLayer],
        block_size: int,
        device: torch.device,
        adapters: Adapters | None = None,
    ) -> Step:
        def ids(array: object) -> torch.Tensor:
            return torch.as_tensor(array, dtype=torch.int64, device=device)

        def slots(tables: Int32Array, lengths: Int32Array) -> list[torch.Tensor]:
            first = ids(tables)[:, :, None] * block_size
            rows = (first + torch.arange(block_size, device=device)).flatten(1)
            return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

        token_ids = ids(batch.token_ids)
        sources: Sequence[torch.Tensor | None] = [None] * batch.num_sequences
        if batch.source_lengths is not None and batch.source_block_tables is not None:
            sources = slots(batch.source_block_tables, batch.source_lengths)
        starts = batch.sequence_starts.tolist()
        sequences = tuple(
            SequenceRows(start, stop, own, source)
            for start, stop, own, source in zip(
                starts[:-1],
                starts[1:],
                slots(batch.block_tables, batch.context_lengths),
                sources,
                strict=True,
            )
        )
        return cls(
            weights=weights,
            kv=kv,
            ids={
                "token_ids": token_ids,
                "positions": ids(batch.positions),
                "token_types": torch.zeros_like(token_ids)
                if batch.token_types is None
                else ids(batch.token_types),
            },
            output_rows=ids(batch.output_rows),
            sequences=sequences,
            adapters=adapters or {},
            rows_of_slots={
                rows: {int(slot): ids(np.flatnonzero(slots == slot)) for slot in set(slots) - {NO_ADAPTER}}
                for rows, slots in slots_of_rows(batch).items()
            },
        )

    def adapters_of(self, weight: Parameter, rows: Rows) -> Iterator[tuple[torch.Tensor, PlacedMatrices]]:
        """The adapters that change a weight, each with the rows that have it."""
        for slot, indices in self.rows_of_slots[rows].items():
            adapter = self.adapters[weight][slot]
            if adapter is not None:
                yield indices, adapter


def slots_of_rows(batch: Batch) -> dict[Rows, Int32Array]:
    """The adapter slot of every row of each kind; nothing where the batch names none."""
    slots = batch.adapter_slots
    if slots is None:
        return {}
    of_tokens = np.repeat(slots, np.diff(batch.sequence_starts))
    return {Rows.TOKENS: of_tokens, Rows.OUTPUTS: of_tokens[batch.output_rows], Rows.SEQUENCES: slots}
