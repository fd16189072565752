"""An executable whose next token is a hash of the whole context, read back through the block tables.

Any mistake in positions, slots, block tables or output rows changes the tokens that follow.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol
from zlib import crc32

import numpy as np

from fastserve.config import ScheduleOptions
from fastserve.engine.adapter import ServedAdapter
from fastserve.engine.engine import Engine
from fastserve.engine.turnstile import Turnstile
from fastserve.types import (
    MAX_TOP_LOGPROBS,
    NO_ADAPTER,
    Batch,
    Limits,
    LowRankMatrices,
    SamplingBatch,
    SamplingParams,
    StepResult,
    UInt8Array,
)

VOCAB_SIZE = 97
MARK = 1000  # what an adapter of rank r computes of a token is the token + r * MARK


class NextToken(Protocol):
    def __call__(self, context: list[int], temperature: float, seed: int, draw: int) -> int: ...


class FakeExecutable:
    def __init__(self, limits: Limits, *, block_size: int = 4, next_token: NextToken | None = None) -> None:
        self._next_token = next_token or hashed_token
        self.limits = limits
        self.block_size = block_size
        self.vocab_size = VOCAB_SIZE
        self.batches: list[Batch] = []
        self._slots = np.full((limits.num_blocks, block_size), -1)
        self._marks = [0] * limits.num_adapter_slots
        self.num_adapters_set = 0

    @property
    def block_bytes(self) -> int:
        return self._slots[0].nbytes

    @property
    def is_pool_on_host(self) -> bool:
        return True

    def read_block(self, block: int, out: UInt8Array) -> None:
        out[:] = self._slots[block].view(np.uint8)

    def write_block(self, block: int, data: UInt8Array) -> None:
        self._slots[block] = data.view(self._slots.dtype)

    def copy_block(self, source: int, target: int) -> None:
        self._slots[target] = self._slots[source]

    def set_adapter(self, slot: int, matrices: Mapping[str, LowRankMatrices] | None) -> None:
        self._marks[slot] = sum(len(matrix.down) for matrix in (matrices or {}).values()) * MARK
        self.num_adapters_set += 1

    def run(self, batch: Batch) -> StepResult:
        self._check(batch)
        self.batches.append(batch)
        row_contexts: dict[int, list[int]] = {}
        for s, (start, end) in enumerate(_ranges(batch)):
            table = batch.block_tables[s]
            adapter = NO_ADAPTER if batch.adapter_slots is None else int(batch.adapter_slots[s])
            mark = 0 if adapter == NO_ADAPTER else self._marks[adapter]
            assert adapter == NO_ADAPTER or mark > 0, "nothing is in the slot"
            for row in range(start, end):
                block, slot = divmod(int(batch.positions[row]), self.block_size)
                self._slots[table[block], slot] = batch.token_ids[row] + mark
            context = self._slots[table].reshape(-1)[: int(batch.context_lengths[s])].tolist()
            for row in range(start, end):
                row_contexts[row] = context[: int(batch.positions[row]) + 1]
        sampling = batch.sampling
        for r, row in enumerate(batch.output_rows):
            history = sampling.history_ids[slice(*sampling.history_starts[r : r + 2].tolist())].tolist()
            assert history in ([], [token_id % MARK for token_id in row_contexts[row]]), (
                "a row's penalties count other tokens than are before it"
            )
        token_ids = [
            self._next_token(
                row_contexts[row],
                float(sampling.temperature[r]),
                int(sampling.seeds[r]),
                int(sampling.draws[r]),
            )
            for r, row in enumerate(batch.output_rows)
        ]
        token_ids = [allowed_token(token_id, sampling, r) for r, token_id in enumerate(token_ids)]
        token_ids = [forced_token(token_id, sampling, r) for r, token_id in enumerate(token_ids)]
        top = np.tile(np.arange(MAX_TOP_LOGPROBS, dtype=np.int32), (len(token_ids), 1))
        return StepResult(
            outputs={},
            token_ids=np.array(token_ids, np.int32),
            is_valid=np.ones(len(token_ids), np.bool_),
            logprobs=-np.array(token_ids, np.float32),
            top_token_ids=top,
            top_logprobs=-top.astype(np.float32),
        )

    def _check(self, batch: Batch) -> None:
        limits = self.limits
        assert 0 < batch.num_tokens <= limits.max_tokens
        assert 0 < batch.num_sequences <= limits.max_sequences
        assert len(batch.output_rows) <= limits.max_outputs
        assert set(batch.output_rows.tolist()) <= set(range(batch.num_tokens))
        written: list[int] = []
        read: set[int] = set()
        for s, (start, end) in enumerate(_ranges(batch)):
            length = int(batch.context_lengths[s])
            assert length <= limits.max_context
            assert batch.positions[start:end].tolist() == list(range(length - (end - start), length))
            first, last = (length - (end - start)) // self.block_size, (length - 1) // self.block_size
            written += batch.block_tables[s][first : last + 1].tolist()
            read |= set(batch.block_tables[s][:first].tolist())
        assert len(set(written)) == len(written), "two sequences write into one block"
        assert not read & set(written), "a sequence writes into a block that another reads"


class LetterDecoder:
    """Token n is the letter n % 26."""

    def __init__(self, *, skip_special_tokens: bool = True) -> None:
        pass

    def push(self, token_id: int) -> str:
        return letter(token_id)

    def finish(self) -> str:
        return ""


def letter(token_id: int) -> str:
    return chr(ord("a") + token_id % 26)


def hashed_token(context: list[int], temperature: float, seed: int, draw: int) -> int:
    drawn = (seed, draw) if temperature > 0 else ()
    return crc32(repr((context, drawn)).encode()) % VOCAB_SIZE


def copied_token(context: list[int], temperature: float, seed: int, draw: int) -> int:
    """What stands seven tokens before, three times of four: lookups guess such a text well, not always."""
    token_id = hashed_token(context, temperature, seed, draw)
    return context[-7] % MARK if len(context) >= 7 and token_id % 4 else token_id


def allowed_token(token_id: int, sampling: SamplingBatch, row: int) -> int:
    """The token itself where the row's mask allows it, else one that it allows."""
    words = sampling.mask_words[sampling.mask_starts[row] : sampling.mask_starts[row + 1]].tolist()
    if not words:
        return token_id
    allowed = [i for i in range(VOCAB_SIZE) if words[i // 32] >> i % 32 & 1]
    return token_id if token_id in allowed else allowed[token_id % len(allowed)]


def forced_token(token_id: int, sampling: SamplingBatch, row: int) -> int:
    """The token that an infinite bias forces, or the token itself."""
    biases = slice(sampling.bias_starts[row], sampling.bias_starts[row + 1])
    forced = sampling.bias_ids[biases][np.isposinf(sampling.bias_values[biases])].tolist()
    return forced[0] if forced else token_id


def plain_loop(prompt_ids: list[int], params: SamplingParams, num_tokens: int, *, rank: int = 0) -> list[int]:
    """The tokens that one sequence alone gets, without an engine, with an adapter of this rank."""
    context = [token_id + rank * MARK for token_id in prompt_ids]
    for draw in range(num_tokens):
        token_id = hashed_token(context, params.temperature, params.seed or 0, draw)
        context.append(token_id + rank * MARK)
    return [token_id % MARK for token_id in context[len(prompt_ids) :]]


def fake_adapter(rank: int) -> ServedAdapter:
    matrix = LowRankMatrices(np.zeros((rank, 1), np.float32), np.zeros((1, rank), np.float32))
    return ServedAdapter(f"adapter-{rank}", Path(), bytes([rank]) * 16, {"matrix": matrix})


def make_engine(
    *,
    context_length: int = 128,
    eos_token_ids: tuple[int, ...] = (),
    prefill_chunk_tokens: int | None = None,
    policy: str = "fcfs",
    options: ScheduleOptions | None = None,
    block_size: int = 4,
    clock: Callable[[], float] = time.perf_counter,
    next_token: NextToken | None = None,
    turnstile: Turnstile | None = None,
    **limits: int,
) -> Engine:
    defaults = {"max_tokens": 32, "max_outputs": 8, "max_sequences": 8, "num_blocks": 64, "max_context": 128}
    return Engine(
        FakeExecutable(Limits(**(defaults | limits)), block_size=block_size, next_token=next_token),
        eos_token_ids=eos_token_ids,
        make_decoder=LetterDecoder,
        context_length=context_length,
        options=options or ScheduleOptions(policy=policy, prefill_chunk_tokens=prefill_chunk_tokens),
        clock=clock,
        turnstile=turnstile,
    )


def _ranges(batch: Batch) -> Iterator[tuple[int, int]]:
    starts = batch.sequence_starts.tolist()
    return itertools.pairwise(starts)
