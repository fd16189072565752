"""The pool of KV blocks. Every block is either free or owned by exactly one sequence."""

from __future__ import annotations

from collections.abc import Sequence


class BlockPool:
    """Hands out the indices of fixed-size KV blocks.

    >>> pool = BlockPool(num_blocks=4, block_size=16)
    >>> blocks = pool.allocate(pool.blocks_for(17))
    >>> len(blocks), pool.num_free
    (2, 2)
    >>> pool.free(blocks)
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))  # a stack: the block freed last is warmest in cache
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks out of the pool. The caller has looked at `num_free`."""
        assert 0 <= num_blocks <= self.num_free, f"{num_blocks} blocks asked, {self.num_free} free"
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._is_free[block] = False
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back."""
        for block in blocks:
            assert not self._is_free[block], f"block {block} is freed twice"
            self._is_free[block] = True
            self._free.append(block)

    def check_invariants(self) -> None:
        """Assert that the free list holds every free block exactly once."""
        assert len(self._free) == sum(self._is_free)
        assert all(self._is_free[block] for block in self._free)
        assert len(set(self._free)) == len(self._free)
