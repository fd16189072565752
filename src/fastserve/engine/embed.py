"""Embeddings of many texts: whole texts packed into flat batches, as many a step as the executable takes."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import accumulate, chain, pairwise

import numpy as np

from fastserve.engine.batch import pad_block_tables
from fastserve.engine.block import BlockPool
from fastserve.types import Batch, Executable, Float32Array


class Embedder:
    """Runs an encoder. A text's embedding does not depend on what else is in the batch."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        limits = executable.limits
        self._pool = BlockPool(num_blocks=limits.num_blocks, block_size=executable.block_size)

    def embed(self, texts: Seq[Seq[int]]) -> Float32Array:
        """Embed texts, given as token ids with their special tokens, each within the model's context.

        Returns float32 [texts, width].
        """
        assert texts, "nothing to embed"
        return np.concatenate([self.run(group) for group in self.groups(texts)])

    def run(self, texts: Seq[Seq[int]]) -> Float32Array:
        """Embed texts that fit one step. Returns float32 [texts, width]."""
        tables = [self._pool.allocate(self._pool.blocks_for(len(text))) for text in texts]
        try:
            result = self._executable.run(build_encoder_batch(texts, tables))
            return result.outputs["embedding"].copy()
        finally:
            self._pool.free(list(chain.from_iterable(tables)))

    def groups(self, texts: Seq[Seq[int]]) -> Iterator[Seq[Seq[int]]]:
        """Texts in their order, in as few groups as steps can take, the largest of which has as few tokens as
        it can: a rest of a text or two would leave threads without work.
        """
        lengths = [len(text) for text in texts]
        low, high = max(lengths), self._executable.limits.max_tokens
        starts = self._cut(lengths, high)
        while low < high:
            most_tokens = (low + high) // 2
            evener = self._cut(lengths, most_tokens)
            if len(evener) > len(starts):
                low = most_tokens + 1
            else:
                starts, high = evener, most_tokens
        for start, end in pairwise([*starts, len(texts)]):
            yield texts[start:end]

    def _cut(self, lengths: Seq[int], most_tokens: int) -> list[int]:
        """Where groups of texts of these lengths start, each as long as `most_tokens` and a step allow."""
        limits = self._executable.limits
        starts = [0]
        num_tokens = num_blocks = 0
        for index, length in enumerate(lengths):
            blocks = self._pool.blocks_for(length)
            num_tokens, num_blocks = num_tokens + length, num_blocks + blocks
            is_full = index - starts[-1] == limits.max_sequences
            if is_full or num_tokens > most_tokens or num_blocks > limits.num_blocks:
                starts.append(index)
                num_tokens, num_blocks = length, blocks
        return starts


def build_encoder_batch(texts: Seq[Seq[int]], block_tables: Seq[Seq[int]]) -> Batch:
    """The batch of whole texts; it has no output rows, as an encoder's output is one row a sequence."""
    lengths = [len(text) for text in texts]
    return Batch(
        token_ids=np.fromiter(chain.from_iterable(texts), np.int32),
        positions=np.fromiter(chain.from_iterable(map(range, lengths)), np.int32),
        sequence_starts=np.fromiter(accumulate(lengths, initial=0), np.int32),
        context_lengths=np.array(lengths, np.int32),
        block_tables=pad_block_tables(block_tables),
        output_rows=np.empty(0, np.int32),
    )
