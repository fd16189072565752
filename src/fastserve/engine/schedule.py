"""Who runs in the next step: first come, first served, batched continuously.

Invariant: a running sequence owns the blocks for its whole length, so nothing fails for memory midway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from fastserve.engine.block import BlockPool
from fastserve.engine.sequence import Sequence, Status
from fastserve.types import Limits


@dataclass(frozen=True, slots=True)
class Turn:
    """A sequence's share of one step: its next `num_tokens` uncomputed tokens."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """Decodes first, then prompts in chunks, under the step's token budget."""

    def __init__(self, pool: BlockPool, limits: Limits, *, prefill_chunk_tokens: int) -> None:
        self._pool = pool
        self._max_tokens = limits.max_tokens
        self._prefill_chunk_tokens = prefill_chunk_tokens
        # One token and one output row each: every running sequence that decodes has its turn in every step.
        self._max_running = min(limits.max_sequences, limits.max_outputs, limits.max_tokens)
        self._waiting: dict[int, Sequence] = {}  # by sequence_id, in order of arrival
        self._running: dict[int, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence.sequence_id] = sequence

    def schedule(self) -> list[Turn]:
        """Admit what fits, then share out one step. Empty only where there is no work."""
        self._admit()
        return list(self._turns())

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, completed or aborted, and free all that it holds."""
        self._waiting.pop(sequence.sequence_id, None)
        self._running.pop(sequence.sequence_id, None)
        self._pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.status = Status.FINISHED

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            sequence = next(iter(self._waiting.values()))
            num_blocks = self._pool.blocks_for(sequence.max_length)
            if num_blocks > self._pool.num_free:
                return
            sequence.block_table = self._pool.allocate(num_blocks)
            sequence.status = Status.RUNNING
            self._running[sequence.sequence_id] = self._waiting.pop(sequence.sequence_id)

    def _turns(self) -> Iterator[Turn]:
        running = self._running.values()
        decodes = (sequence for sequence in running if sequence.is_decoding)
        prefills = (sequence for sequence in running if not sequence.is_decoding)
        budget = self._max_tokens
        for sequence in chain(decodes, prefills):
            num_tokens = min(sequence.num_uncomputed_tokens, self._prefill_chunk_tokens, budget)
            if num_tokens == 0:
                return
            budget -= num_tokens
            yield Turn(sequence, num_tokens)
