"""Encoders: whole texts packed into flat batches, as many a step as the executable takes."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np

from fastserve.engine.batch import pad_block_tables
from fastserve.engine.block import BlockPool
from fastserve.models.head import Head
from fastserve.types import Batch, Executable, Float32Array


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """What an encoder reads at once: token ids with their special tokens, within the model's context.

    `token_types` are as many; None is all zero, and must be for a model without such. `member` is the one of
    an ensemble that reads it.
    """

    token_ids: Seq[int]
    token_types: Seq[int] | None = None
    member: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Member:
    """An executable and its blocks."""

    executable: Executable
    pool: BlockPool


class Encoder:
    """Runs an encoder, or the members of an ensemble. What comes of a text does not depend on what else is in
    the batch.

    Args:
        executable: of the model, or of the first member.
        head: that the model ends in; None where it gives embeddings.
        others: executables of the other members, which end as the first one does.
    """

    def __init__(
        self, executable: Executable, head: Head | None = None, *, others: Seq[Executable] = ()
    ) -> None:
        self._output = "embedding" if head is None else "logits"
        self._is_per_token = head is not None and head.is_per_token
        self._members = [
            _Member(one, BlockPool(num_blocks=one.limits.num_blocks, block_size=one.block_size))
            for one in (executable, *others)
        ]

    @property
    def max_inputs(self) -> int:
        """Most inputs of a step."""
        return sum(member.executable.limits.max_sequences for member in self._members)

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
        """As `run_all`, of inputs that fit one step: a run of each member that has some."""
        if len(self._members) == 1:
            return self._run_member(self._members[0], inputs)
        results: dict[int, Float32Array] = {}
        for index, member in enumerate(self._members):
            places = [place for place, input_ in enumerate(inputs) if input_.member == index]
            if places:
                found = self._run_member(member, [inputs[place] for place in places])
                results.update(zip(places, found, strict=True))
        return [results[place] for place in range(len(inputs))]

    def groups(self, inputs: Seq[EncoderInput]) -> Iterator[Seq[EncoderInput]]:
        """Inputs in their order, in as few groups as steps can take, the largest of which has as few tokens
        as it can: a rest of a text or two would leave threads without work.
        """
        low = max(len(input_) for input_ in inputs)
        high = max(member.executable.limits.max_tokens for member in self._members)
        sizes = [
            (input_.member, len(input_), self._members[input_.member].pool.blocks_for(len(input_)))
            for input_ in inputs
        ]
        starts = self._cut(sizes, high)
        while low < high:
            most_tokens = (low + high) // 2
            evener = self._cut(sizes, most_tokens)
            if len(evener) > len(starts):
                low = most_tokens + 1
            else:
                starts, high = evener, most_tokens
        for start, end in pairwise([*starts, len(inputs)]):
            yield inputs[start:end]

    def _run_member(self, member: _Member, inputs: Seq[EncoderInput]) -> list[Float32Array]:
        tables = [member.pool.allocate(member.pool.blocks_for(len(input_))) for input_ in inputs]
        try:
            batch = build_encoder_batch(inputs, tables)
            rows = member.executable.run(batch).outputs[self._output].copy()
        finally:
            member.pool.free(list(chain.from_iterable(tables)))
        if self._is_per_token:
            return np.split(rows, batch.sequence_starts[1:-1])
        return list(rows)

    def _cut(self, sizes: Seq[tuple[int, int, int]], most_tokens: int) -> list[int]:
        """Where groups of inputs start, each as long as a step allows, with at most `most_tokens` of each
        member. Of each input `sizes` has its member, tokens and blocks."""
        limits = [member.executable.limits for member in self._members]
        starts = [0]
        loads = [(0, 0, 0)] * len(limits)  # inputs, tokens and blocks of each member
        for index, (member, tokens, blocks) in enumerate(sizes):
            num_inputs, num_tokens, num_blocks = loads[member]
            most = limits[member]
            if (
                num_inputs == most.max_sequences
                or num_tokens + tokens > min(most_tokens, most.max_tokens)
                or num_blocks + blocks > most.num_blocks
            ):
                starts.append(index)
                loads = [(0, 0, 0)] * len(limits)
                num_inputs, num_tokens, num_blocks = 0, 0, 0
            loads[member] = num_inputs + 1, num_tokens + tokens, num_blocks + blocks
        return starts


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
