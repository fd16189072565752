"""Encoders: whole texts packed into flat batches, as many a step as the executable takes."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np

from fastserve.engine.adapter import ServedAdapter
from fastserve.engine.adapter_slots import AdapterSlots
from fastserve.engine.batch import pad_block_tables
from fastserve.engine.block import BlockPool
from fastserve.engine.sequence import Sequence
from fastserve.models.head import Head
from fastserve.types import Batch, Executable, Float32Array


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """What an encoder reads at once: token ids with their special tokens, within the model's context.

    `token_types` are as many; None is all zero, and must be for a model without such. `adapter` is beside the
    model. `member` is the one of an ensemble that reads it.
    """

    token_ids: Seq[int]
    token_types: Seq[int] | None = None
    adapter: ServedAdapter | None = None
    member: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


class _Member:
    """An executable, its blocks and its adapters."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self.pool = BlockPool(num_blocks=executable.limits.num_blocks, block_size=executable.block_size)
        self._adapter_slots = AdapterSlots(executable.limits.num_adapter_slots)

    def run(self, inputs: Seq[EncoderInput], output: str) -> tuple[Float32Array, Batch]:
        """The rows of an output, of inputs that fit one step, and the batch that gave them."""
        tables = [self.pool.allocate(self.pool.blocks_for(len(input_))) for input_ in inputs]
        try:
            batch = build_encoder_batch(inputs, tables, adapter_slots=self._slots_for(inputs))
            return self.executable.run(batch).outputs[output].copy(), batch
        finally:
            self.pool.free(list(chain.from_iterable(tables)))

    def _slots_for(self, inputs: Seq[EncoderInput]) -> list[int] | None:
        """Where the adapters of these inputs lie, once they are there; None where there are none."""
        if all(input_.adapter is None for input_ in inputs):
            return None
        self._adapter_slots.begin(())
        for input_ in inputs:
            self._adapter_slots.use(input_.adapter)
        self._adapter_slots.write(self.executable)
        return [self._adapter_slots.slot_of(input_.adapter) for input_ in inputs]


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
        self._members = [_Member(one) for one in (executable, *others)]

    @property
    def max_inputs(self) -> int:
        """Most inputs of a step."""
        return sum(member.executable.limits.max_sequences for member in self._members)

    def embed(self, texts: Seq[Seq[int]], *, adapter: ServedAdapter | None = None) -> Float32Array:
        """Embed texts, given as token ids with their special tokens, each within the model's context, all
        with one adapter or none.

        Returns float32 [texts, width].
        """
        assert texts, "nothing to embed"
        return np.stack(self.run_all([EncoderInput(text, adapter=adapter) for text in texts]))

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
        low = max(map(len, inputs))
        high = max(member.executable.limits.max_tokens for member in self._members)
        blocks = [self._members[one.member].pool.blocks_for(len(one)) for one in inputs]
        starts = self._cut(inputs, blocks, high)
        while low < high:
            most_tokens = (low + high) // 2
            evener = self._cut(inputs, blocks, most_tokens)
            if len(evener) > len(starts):
                low = most_tokens + 1
            else:
                starts, high = evener, most_tokens
        for start, end in pairwise([*starts, len(inputs)]):
            yield inputs[start:end]

    def _run_member(self, member: _Member, inputs: Seq[EncoderInput]) -> list[Float32Array]:
        rows, batch = member.run(inputs, self._output)
        if self._is_per_token:
            return np.split(rows, batch.sequence_starts[1:-1])
        return list(rows)

    def _cut(self, inputs: Seq[EncoderInput], blocks: Seq[int], most_tokens: int) -> list[int]:
        """Where groups of inputs, which take so many `blocks`, start: each as long as a step allows, with at
        most `most_tokens` of each member."""
        limits = [member.executable.limits for member in self._members]
        starts = [0]
        loads = [_NO_LOAD] * len(limits)
        for index, (input_, own_blocks) in enumerate(zip(inputs, blocks, strict=True)):
            most = limits[input_.member]
            load = _add(loads[input_.member], input_, own_blocks)
            if (
                load[0] > most.max_sequences
                or load[1] > min(most_tokens, most.max_tokens)
                or load[2] > most.num_blocks
                or len(load[3]) > most.num_adapter_slots
            ):
                starts.append(index)
                loads = [_NO_LOAD] * len(limits)
                load = _add(_NO_LOAD, input_, own_blocks)
            loads[input_.member] = load
        return starts


_Load = tuple[int, int, int, frozenset[ServedAdapter]]
"""What a member has to run in one step: inputs, tokens, blocks, adapters."""

_NO_LOAD: _Load = (0, 0, 0, frozenset())


def _add(load: _Load, input_: EncoderInput, blocks: int) -> _Load:
    num_inputs, num_tokens, num_blocks, adapters = load
    if input_.adapter is not None:
        adapters |= {input_.adapter}
    return num_inputs + 1, num_tokens + len(input_), num_blocks + blocks, adapters


def build_source_batch(sequences: Seq[Sequence], *, adapter_slots: AdapterSlots | None = None) -> Batch:
    """What an encoder reads for sequences: their sources. Without `adapter_slots` no adapter is used."""
    inputs = [EncoderInput(sequence.token_ids[: sequence.num_given_tokens]) for sequence in sequences]
    slots = None
    if adapter_slots is not None:
        slots = [adapter_slots.slot_of(sequence.adapter) for sequence in sequences]
    return build_encoder_batch(
        inputs, [sequence.source_blocks for sequence in sequences], adapter_slots=slots
    )


def build_encoder_batch(
    inputs: Seq[EncoderInput], block_tables: Seq[Seq[int]], *, adapter_slots: Seq[int] | None = None
) -> Batch:
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
        adapter_slots=None if adapter_slots is None else np.array(adapter_slots, np.int32),
    )
