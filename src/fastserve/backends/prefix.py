"""A model whose texts all come after the same stored keys and values: its prefix.

The last blocks of an executable's KV pool hold it, for as long as the executable lives, and every
sequence's block table begins with them. Who runs steps knows nothing of it: positions, context lengths,
blocks and limits are those of texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fastserve.types import (
    Batch,
    Executable,
    Limits,
    LowRankMatrices,
    SourceExecutable,
    StepResult,
    UInt8Array,
)


def prefix_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks that a prefix takes."""
    return -(-num_tokens // block_size)


def empty_slots(num_tokens: int, block_size: int) -> int:
    """Slots before a prefix, so that it ends where a block does: texts then have blocks of their own.

    >>> empty_slots(20, 32), empty_slots(32, 32)
    (12, 0)
    """
    return -num_tokens % block_size


class PrefixedExecutable:
    """Implements `fastserve.types.Executable`, by one that was compiled for a graph with `empty_slots` (see
    `fastserve.graph.passes.leave_slots_empty`), and for the prefix's blocks beside those of texts.

    Args:
        inner: as above.
        num_tokens: of the prefix.
        source: what stores the prefix, over a pool of as many blocks as it takes, of the same layers and
            format.
    """

    def __init__(self, inner: Executable, num_tokens: int, source: SourceExecutable) -> None:
        assert source.block_bytes == inner.block_bytes
        assert source.block_size == inner.block_size
        self.inner = inner
        count = prefix_blocks(num_tokens, inner.block_size)
        self._num_slots = count * inner.block_size
        limits = inner.limits
        self._limits = replace(
            limits, num_blocks=limits.num_blocks - count, max_context=limits.max_context - self._num_slots
        )
        self._blocks = np.arange(self._limits.num_blocks, limits.num_blocks, dtype=np.int32)
        self._fill(num_tokens, source)

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def block_size(self) -> int:
        return self.inner.block_size

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def block_bytes(self) -> int:
        return self.inner.block_bytes

    @property
    def is_pool_on_host(self) -> bool:
        return self.inner.is_pool_on_host

    def run(self, batch: Batch) -> StepResult:
        return self.inner.run(self._after_prefix(batch))

    def set_adapter(self, slot: int, matrices: Mapping[str, LowRankMatrices] | None) -> None:
        self.inner.set_adapter(slot, matrices)

    def read_block(self, block: int, out: UInt8Array) -> None:
        self.inner.read_block(self._own(block), out)

    def write_block(self, block: int, data: UInt8Array) -> None:
        self.inner.write_block(self._own(block), data)

    def copy_block(self, source: int, target: int) -> None:
        self.inner.copy_block(self._own(source), self._own(target))

    def _own(self, block: int) -> int:
        """A block of texts. Raises ValueError where it is none."""
        if not 0 <= block < self._limits.num_blocks:
            raise ValueError(f"block is {block}; the limits are 0 and {self._limits.num_blocks - 1}")
        return block

    def _after_prefix(self, batch: Batch) -> Batch:
        before = np.broadcast_to(self._blocks, (batch.num_sequences, len(self._blocks)))
        return replace(
            batch,
            positions=batch.positions + np.int32(self._num_slots),
            context_lengths=batch.context_lengths + np.int32(self._num_slots),
            block_tables=np.concatenate([before, batch.block_tables], axis=1, dtype=np.int32),
        )

    def _fill(self, num_tokens: int, source: SourceExecutable) -> None:
        """Have a prefix stored, and copy it, block by block."""
        size = self.block_size
        empty = empty_slots(num_tokens, size)
        # What the empty slots hold is never read, but must be something: the first token.
        token_ids = np.maximum(np.arange(self._num_slots, dtype=np.int32) - empty, 0)
        data = np.empty(self.block_bytes, np.uint8)
        for index, block in enumerate(self._blocks):
            source.encode(_block_batch(token_ids[index * size : (index + 1) * size], index))
            source.read_block(index, data)
            self.inner.write_block(int(block), data)


def _block_batch(token_ids: np.ndarray[tuple[int], np.dtype[np.int32]], block: int) -> Batch:
    """One sequence, which is one block."""
    count = len(token_ids)
    return Batch(
        token_ids=token_ids,
        positions=np.arange(count, dtype=np.int32),
        sequence_starts=np.array([0, count], np.int32),
        context_lengths=np.array([count], np.int32),
        block_tables=np.array([[block]], np.int32),
        output_rows=np.empty(0, np.int32),
    )
