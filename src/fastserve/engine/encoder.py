"""Encoders: whole texts packed into flat batches, as many a step as the executable takes."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np

from fastserve.engine.batch import pad_block_tables
from fastserve.engine.block import BlockPool
from fastserve.engine.sequence import Sequence
from fastserve.models.head import Head
from fastserve.types import Batch, Executable, Float32Array


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """What an encoder reads at once: token ids with their special tokens, within the model's context.

    `token_types` are as many; None is all zero, and must be for a model without such.
    """

    token_ids: Seq[int]
    token_types: Seq[int] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


class Encoder:
    """Runs an encoder. What comes of a text does not depend on what else is in the batch.

    Args:
        head: that the model ends in; None where it gives embeddings.
    """

    def __init__(self, executable: Executable, head: Head | None = None) -> None:
        self._executable = executable
        self._output = "embedding" if head is None else "logits"
        self._is_per_token = head is not None and head.is_per_token
        limits = executable.limits
        self._pool = BlockPool(num_blocks=limits.num_blocks, block_size=executable.block_size)

    def embed(self, texts: Seq[Seq[int]]) -> Float32Array:
        """Embed texts, given as token ids with their special tokens, each within the model's context.

        Returns float32 [texts, width].
        """
        assert texts, "nothing to embed"
        return np.stack(self.run_all([EncoderInput(text) for text in texts]))

    def run_all(self, inputs: Seq[EncoderInput]) -> list[Float32Array]:
        """What comes of each: an embedding [width], or logits [labels], or [tokens, labels] where each token
        has some."""
        return [result for group in self.groups(inputs) for result in self.run(group)] if inputs else []

    def run(self, inputs: Seq[EncoderInput]) -> list[Float32Array]:
        """As `run_all`, of inputs that fit one step."""
        tables = [self._pool.allocate(self._pool.blocks_for(len(input_))) for input_ in inputs]
        try:
            batch = build_encoder_batch(inputs, tables)
            rows = self._executable.run(batch).outputs[self._output].copy()
        finally:
            self._pool.free(list(chain.from_iterable(tables)))
        if self._is_per_token:
            return np.split(rows, batch.sequence_starts[1:-1])
        return list(rows)

    def groups(self, inputs: Seq[EncoderInput]) -> Iterator[Seq[EncoderInput]]:
        """Inputs in their order, in as few groups as steps can take, the largest of which has as few tokens
        as it can: a rest of a text or two would leave threads without work.
        """
        lengths = [len(input_) for input_ in inputs]
        low, high = max(lengths), self._executable.limits.max_tokens
        starts = self._cut(lengths, high)
        while low < high:
            most_tokens = (low + high) // 2
            evener = self._cut(lengths, most_tokens)
            if len(evener) > len(starts):
                low = most_tokens + 1
            else:
                starts, high = evener, most_tokens
        for start, end in pairwise([*starts, len(inputs)]):
            yield inputs[start:end]

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


def build_source_batch(sequences: Seq[Sequence]) -> Batch:
    """What an encoder reads for sequences: their sources."""
    inputs = [EncoderInput(sequence.token_ids[: sequence.num_given_tokens]) for sequence in sequences]
    return build_encoder_batch(inputs, [sequence.source_blocks for sequence in sequences])


def build_encoder_batch(inputs: Seq[EncoderInput], block_tables: Seq[Seq[int]]) -> Batch:
    """The batch of whole inputs. It has no output rows: encoders give a row a sequence, or a row a token."""
    lengths = [len(input_) for input_ in inputs]
    token_types = None
    if any(input_.token_types is not None for input_ in inputs):
        types = (input_.token_types or [0] * len(input_) for input_ in inputs)
        token_types = np.fromiter(chain.from_iterable(types), np.int32)
    return Batch(
        token_ids=np.fromiter(chain.from_iterable(input_.token_ids for input_ in inputs), np.int32),
        positions=np.fromiter(chain.from_iterable(map(range, lengths)), np.int32),
        sequence_starts=np.fromiter(accumulate(lengths, initial=0), np.int32),
        context_lengths=np.array(lengths, np.int32),
        block_tables=pad_block_tables(block_tables),
        output_rows=np.empty(0, np.int32),
        token_types=token_types,
    )
