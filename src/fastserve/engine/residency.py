"""Where the keys and values of sequences lie: in blocks of the fast pool, in the slow tier, on the way, or
nowhere.

Nothing here decides who should be where; that is the scheduler's. A sequence's blocks are its own until they
are free in the pool, however it ends.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from fastserve.engine.block import BlockPool
from fastserve.engine.cost import OnlineStepCost
from fastserve.engine.mover import Move, Mover, MoveResult
from fastserve.engine.sequence import Residence, Sequence

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ResidencyCounters:
    """What has happened since the start."""

    evictions: int = 0  # of sequences, whose blocks were moved or dropped
    dropped_tokens: int = 0  # computed, and to be computed again
    blocks_out: int = 0  # moved to the slow tier
    blocks_in: int = 0
    failed_moves: int = 0
    prefix_tokens: int = 0  # found in the cache of prefixes instead of being computed
    admitted_tokens: int = 0  # looked for there


class Residency:
    """Lets sequences into the fast pool, out of it, and back.

    Args:
        mover: copies blocks to and from the slow tier; None is no slow tier.
        cost: of a step: what is cheaper to compute again than to move is dropped.
        reuses_prefixes: whether sequences find what others with the same beginning have computed.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        mover: Mover | None = None,
        cost: OnlineStepCost,
        reuses_prefixes: bool = True,
    ) -> None:
        self.pool = pool
        self._reuses_prefixes = reuses_prefixes
        self.counters = ResidencyCounters()
        self._mover = mover
        self._cost = cost
        self._free_slow = list(reversed(range(mover.num_slow_blocks))) if mover else []
        # By sequence_id, with the number of blocks that will be free.
        self._moving: dict[int, tuple[Sequence, int]] = {}
        self._sources: list[int] = []  # of copies: owned until they are made, which is before the step runs
        self.num_leaving = 0  # blocks that will be free when what is under way is done

    @property
    def is_moving(self) -> bool:
        return bool(self._moving)

    @property
    def can_move(self) -> bool:
        """Whether there is a slow tier with room."""
        return bool(self._free_slow)

    @property
    def num_slow_blocks(self) -> int:
        return self._mover.num_slow_blocks if self._mover else 0

    @property
    def num_slow_blocks_used(self) -> int:
        return self.num_slow_blocks - len(self._free_slow)

    def settle(self) -> None:
        """Take note of the moves that have finished. The copies of the last step have been made."""
        self._free_sources()
        if self._moving and self._mover is not None:
            for result in self._mover.poll():
                self._settle(result)

    def wait(self, timeout_seconds: float) -> None:
        """Sleep until a move has finished."""
        if self._moving and self._mover is not None:
            self._mover.wait(timeout_seconds)

    def num_to_compute(self, sequence: Sequence) -> int:
        """Tokens that a sequence has yet to compute, less those of a prefix that is known if it were let in
        now."""
        if sequence.residence is not Residence.NOWHERE:
            return sequence.num_uncomputed_tokens
        known, _ = self.pool.num_known(sequence.keys(self._num_reusable(sequence), self.pool.block_size))
        return len(sequence.token_ids) - known * self.pool.block_size

    def blocks_to_enter(self, sequence: Sequence) -> int:
        """Blocks that the pool must have free to let it in: for all its tokens, less what others own."""
        if sequence.residence is Residence.SLOW:
            num_full = sequence.num_computed_tokens // self.pool.block_size
            total = self.pool.blocks_for(sequence.num_computed_tokens)
        else:
            num_full = self._num_reusable(sequence)
            total = self.pool.blocks_for(len(sequence.token_ids))
        known, cached = self.pool.num_known(sequence.keys(num_full, self.pool.block_size))
        return total - known + cached

    def enter(self, sequence: Sequence) -> None:
        """Give it blocks: of a known prefix, as far as there is one, and free ones. From the slow tier it is
        then on the way; else it can run at once."""
        sequence.resident_seconds = 0.0
        sequence.num_entry_tokens = len(sequence.token_ids)
        if sequence.residence is Residence.SLOW:
            self._bring_back(sequence)
        else:
            self._let_in(sequence)

    def has_slot(self, sequence: Sequence) -> bool:
        """Whether its next token has a slot already, in a block that is its own: it need not grow."""
        index = sequence.num_computed_tokens // self.pool.block_size
        table = sequence.block_table
        return index < len(table) and not self.pool.is_shared(table[index])

    def blocks_to_grow(self, sequence: Sequence, num_tokens: int) -> int:
        """Free blocks that it needs to compute so many more tokens."""
        end = sequence.num_computed_tokens + num_tokens
        num_more = max(self.pool.blocks_for(end) - len(sequence.block_table), 0)  # drafts may have left some
        return num_more + (self._shared_tail(sequence) is not None)

    def grow(self, sequence: Sequence, num_tokens: int) -> tuple[int, int] | None:
        """Give it those blocks. Where it would write into a block that others read, it gets one of its own,
        which the caller fills before the step: (source, target)."""
        copy = None
        tail = self._shared_tail(sequence)
        if tail is not None:
            source = sequence.block_table[tail]
            (target,) = self.pool.allocate(1)
            sequence.block_table[tail] = target
            self._sources.append(source)
            copy = source, target
        end = sequence.num_computed_tokens + num_tokens
        num_more = self.pool.blocks_for(end) - len(sequence.block_table)
        if num_more > 0:
            sequence.block_table += self.pool.allocate(num_more)
        return copy

    def register(self, sequence: Sequence) -> None:
        """Let its full and computed blocks be found by sequences that begin like it."""
        num_full = sequence.num_computed_tokens // self.pool.block_size
        if num_full > sequence.num_registered and self._reuses_prefixes:
            keys = sequence.keys(num_full, self.pool.block_size)
            for index in range(sequence.num_registered, num_full):
                self.pool.register(sequence.block_table[index], keys[index])
            sequence.num_registered = num_full

    def fork(self, sequence: Sequence, child: Sequence) -> None:
        """Let a child, whose tokens begin with all that is computed of this sequence, share its blocks."""
        self.pool.share(sequence.block_table)
        child.block_table = list(sequence.block_table)
        child.num_computed_tokens = sequence.num_computed_tokens
        child.num_registered = sequence.num_registered
        child.residence = Residence.FAST

    def num_own_blocks(self, sequence: Sequence) -> int:
        """Blocks that nobody shares with it: what its eviction frees."""
        return sum(not self.pool.is_shared(block) for block in sequence.block_table)

    def is_cheaper_to_move(self, sequence: Sequence) -> bool:
        """Whether its eviction is a move, and does not lose what is computed."""
        return self._move_seconds(sequence) < self._recompute_seconds(sequence)

    def eviction_seconds(self, sequence: Sequence) -> float:
        """What it costs that it leaves and comes back, in the cheaper way."""
        return min(self._move_seconds(sequence), self._recompute_seconds(sequence))

    def evict(self, sequence: Sequence) -> None:
        """Take its blocks: they are moved, and free some time later, or dropped, and free at once."""
        assert sequence.residence is Residence.FAST
        sequence.num_evictions += 1
        self.counters.evictions += 1
        if self.is_cheaper_to_move(sequence):
            self._send_away(sequence)
        else:
            self._drop(sequence)

    def release(self, sequence: Sequence) -> None:
        """It is finished: free what it holds, of what is on the way as soon as it has come."""
        self._free_sources()
        is_moving = sequence.residence in (Residence.LEAVING, Residence.ARRIVING)
        sequence.residence = Residence.FINISHED
        if not is_moving:
            self._free(sequence)

    def check_invariants(self, sequences: list[Sequence]) -> None:
        """Assert that blocks of both tiers are free or owned by sequences as their residence says."""
        ended = [s for s, _ in self._moving.values() if s.residence is Residence.FINISHED]
        owners = [*sequences, *ended]
        self.pool.check_invariants([block for s in owners for block in s.block_table] + self._sources)
        slow = [block for s in owners for block in s.slow_blocks] + self._free_slow
        assert len(set(slow)) == len(slow) == self.num_slow_blocks
        assert self.num_leaving == sum(num_freed for _, num_freed in self._moving.values())
        for s in sequences:
            assert (s.sequence_id in self._moving) == (s.residence in (Residence.LEAVING, Residence.ARRIVING))
            num_blocks = self.pool.blocks_for(s.num_computed_tokens)
            match s.residence:
                case Residence.NOWHERE:
                    assert not s.block_table
                    assert not s.slow_blocks
                    assert s.num_computed_tokens == 0
                case Residence.FAST:
                    assert not s.slow_blocks
                    assert len(s.block_table) >= num_blocks
                case Residence.SLOW:
                    assert not s.block_table
                    assert len(s.slow_blocks) == num_blocks
                case Residence.LEAVING | Residence.ARRIVING:
                    assert len(s.block_table) == len(s.slow_blocks) == num_blocks
                case Residence.FINISHED:
                    raise AssertionError("a finished sequence is still scheduled")

    def _free_sources(self) -> None:
        self.pool.free(self._sources)
        self._sources = []

    def _num_reusable(self, sequence: Sequence) -> int:
        """Full blocks before its last token, which is computed in any case: it gives the logits. None where
        the logits of all are wanted."""
        if sequence.is_to_be_scored:
            return 0
        return (len(sequence.token_ids) - 1) // self.pool.block_size

    def _shared_tail(self, sequence: Sequence) -> int | None:
        """Index of the block that it writes next, if others read that."""
        index = sequence.num_computed_tokens // self.pool.block_size
        table = sequence.block_table
        return index if index < len(table) and self.pool.is_shared(table[index]) else None

    def _move_seconds(self, sequence: Sequence) -> float:
        num_blocks = self.pool.blocks_for(sequence.num_computed_tokens)
        if self._mover is None or sequence.must_drop or num_blocks > len(self._free_slow):
            return math.inf
        return 2 * num_blocks * self._mover.seconds_per_block()

    def _recompute_seconds(self, sequence: Sequence) -> float:
        return self._cost.prefill_seconds_of(sequence.num_computed_tokens)

    def _send_away(self, sequence: Sequence) -> None:
        num_blocks = self.pool.blocks_for(sequence.num_computed_tokens)
        self.pool.free(sequence.block_table[num_blocks:])
        del sequence.block_table[num_blocks:]
        sequence.slow_blocks = [self._free_slow.pop() for _ in range(num_blocks)]
        sequence.residence = Residence.LEAVING
        pairs = tuple(zip(sequence.block_table, sequence.slow_blocks, strict=True))
        self._submit(sequence, Move(sequence.sequence_id, "out", pairs))

    def _let_in(self, sequence: Sequence) -> None:
        assert sequence.residence is Residence.NOWHERE
        shared = self.pool.lookup(sequence.keys(self._num_reusable(sequence), self.pool.block_size))
        num_more = self.pool.blocks_for(len(sequence.token_ids)) - len(shared)
        sequence.block_table = shared + self.pool.allocate(num_more)
        sequence.num_computed_tokens = len(shared) * self.pool.block_size
        sequence.num_registered = len(shared)
        sequence.residence = Residence.FAST
        self.counters.prefix_tokens += sequence.num_computed_tokens
        self.counters.admitted_tokens += len(sequence.token_ids)

    def _bring_back(self, sequence: Sequence) -> None:
        """Blocks whose prefix is still in the pool need no copy."""
        num_full = sequence.num_computed_tokens // self.pool.block_size
        shared = self.pool.lookup(sequence.keys(num_full, self.pool.block_size))
        fresh = self.pool.allocate(len(sequence.slow_blocks) - len(shared))
        sequence.block_table = shared + fresh
        sequence.num_registered = len(shared)
        pairs = tuple(zip(fresh, sequence.slow_blocks[len(shared) :], strict=True))
        if pairs:
            sequence.residence = Residence.ARRIVING
            self._submit(sequence, Move(sequence.sequence_id, "in", pairs))
        else:
            self._free_slow_blocks(sequence)
            sequence.residence = Residence.FAST

    def _submit(self, sequence: Sequence, move: Move) -> None:
        assert self._mover is not None
        num_freed = self.num_own_blocks(sequence) if move.direction == "out" else 0
        self.num_leaving += num_freed
        self._moving[sequence.sequence_id] = sequence, num_freed
        self._mover.submit(move)

    def _settle(self, result: MoveResult) -> None:
        move = result.move
        sequence, num_freed = self._moving.pop(move.sequence_id)
        self.num_leaving -= num_freed
        if result.error is not None:
            self.counters.failed_moves += 1
            logger.warning(
                "moving %d blocks %s of the slow tier failed: %s; %s",
                len(move.pairs),
                "in" if move.direction == "in" else "out",
                result.error,
                "they are computed again" if move.direction == "in" else "they stay in memory",
            )
        if sequence.residence is Residence.FINISHED:
            self._free(sequence)
        elif move.direction == "out":
            self._settle_out(sequence, result)
        else:
            self._settle_in(sequence, result)

    def _settle_out(self, sequence: Sequence, result: MoveResult) -> None:
        if result.error is not None:  # nothing is lost: the blocks are still there
            self._free_slow_blocks(sequence)
            sequence.residence = Residence.FAST
            sequence.must_drop = True
            return
        self.counters.blocks_out += len(result.move.pairs)
        self._free_blocks(sequence)
        sequence.residence = Residence.SLOW

    def _settle_in(self, sequence: Sequence, result: MoveResult) -> None:
        sequence.residence = Residence.FAST
        self._free_slow_blocks(sequence)
        if result.error is not None:
            self._drop(sequence)
            return
        self.counters.blocks_in += len(result.move.pairs)
        self.register(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self.counters.dropped_tokens += sequence.num_computed_tokens
        self._free_blocks(sequence)
        sequence.num_computed_tokens = sequence.num_cached_tokens = 0
        sequence.residence = Residence.NOWHERE

    def _free(self, sequence: Sequence) -> None:
        self._free_blocks(sequence)
        self._free_slow_blocks(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_registered = 0

    def _free_slow_blocks(self, sequence: Sequence) -> None:
        self._free_slow += sequence.slow_blocks
        sequence.slow_blocks = []
