"""The pool of KV blocks: counted owners, and a cache of prefixes in the blocks that nobody owns.

Every block is free, cached (nobody owns it, but it holds a known prefix and can be found again), or owned by
one or more sequences. The cache takes whatever the owners leave, and gives it back block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from fastserve.engine.eviction import EvictionName, make_eviction

PrefixKey = bytes
"""Stands for all tokens from the start of a text to the end of a block, and for who may share them."""


class BlockPool:
    """Hands out the indices of fixed-size KV blocks.

    >>> pool = BlockPool(num_blocks=4, block_size=16)
    >>> blocks = pool.allocate(pool.blocks_for(17))
    >>> len(blocks), pool.num_free
    (2, 2)
    >>> pool.register(blocks[0], prefix_key(b"", range(16)))
    >>> pool.free(blocks)
    >>> pool.num_free, pool.lookup([prefix_key(b"", range(16))]) == blocks[:1]
    (4, True)

    Args:
        eviction: which cached prefix goes first, the least recently or the least frequently used.
    """

    def __init__(self, *, num_blocks: int, block_size: int, eviction: EvictionName = "lru") -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))  # a stack: the block freed last is warmest in cache
        self._num_owners = [0] * num_blocks
        self._keys: dict[int, PrefixKey] = {}  # by block
        self._blocks: dict[PrefixKey, int] = {}
        self._num_uses: dict[int, int] = {}  # of blocks that have a key
        self._evictable = make_eviction(eviction)

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: those that nobody owns, cached ones among them."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody owns and that hold a prefix."""
        return len(self._evictable)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks out of the pool, cached ones last. The caller has looked at `num_free`."""
        assert 0 <= num_blocks <= self.num_free, f"{num_blocks} blocks asked, {self.num_free} free"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Give owned blocks one more owner each."""
        for block in blocks:
            assert self._num_owners[block] > 0, f"block {block} has no owner"
            self._num_owners[block] += 1

    def is_shared(self, block: int) -> bool:
        """Whether somebody else would see what is written into it."""
        return self._num_owners[block] > 1

    def free(self, blocks: Sequence[int]) -> None:
        """Give up ownership. The last blocks of a text are evicted first: no prefix is longer than what is
        before it."""
        for block in reversed(blocks):
            assert self._num_owners[block] > 0, f"block {block} is freed twice"
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                if block in self._keys:
                    self._evictable.add(block, self._num_uses[block])
                else:
                    self._free.append(block)

    def register(self, block: int, key: PrefixKey) -> None:
        """Make a full and computed block findable. Nothing happens where its prefix is known already."""
        assert self._num_owners[block] > 0, f"block {block} has no owner"
        if key not in self._blocks and block not in self._keys:
            self._keys[block] = key
            self._blocks[key] = block
            self._num_uses[block] = 1

    def num_known(self, keys: Sequence[PrefixKey]) -> tuple[int, int]:
        """How many of the first blocks of a text are known, and how many of those nobody owns."""
        known = cached = 0
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            known += 1
            cached += self._num_owners[block] == 0
        return known, cached

    def lookup(self, keys: Sequence[PrefixKey]) -> list[int]:
        """Become an owner of the longest known run of first blocks."""
        blocks: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            if self._num_owners[block] == 0:
                self._evictable.remove(block)
            self._num_owners[block] += 1
            self._num_uses[block] += 1
            blocks.append(block)
        return blocks

    def forget(self) -> None:
        """Empty the cache of prefixes."""
        for block in [*self._keys]:
            self._unregister(block)
            if self._num_owners[block] == 0:
                self._evictable.remove(block)
                self._free.append(block)

    def check_invariants(self, owned: Sequence[int]) -> None:
        """Assert that the blocks named in `owned`, once for each owner, are all that is owned, and that the
        others are free or cached, each exactly once."""
        counts = np.bincount(np.asarray(owned, np.int64), minlength=self.num_blocks)
        assert counts.tolist() == self._num_owners, "owners are miscounted"
        assert len(set(self._free)) == len(self._free)
        assert all(self._num_owners[block] == 0 and block not in self._keys for block in self._free)
        num_idle_keys = sum(self._num_owners[block] == 0 for block in self._keys)
        assert num_idle_keys == len(self._evictable)
        assert self.num_free == self._num_owners.count(0)
        assert {key: block for block, key in self._keys.items()} == self._blocks
        assert self._keys.keys() == self._num_uses.keys()

    def _evict(self) -> int:
        block = self._evictable.pop()
        self._unregister(block)
        return block

    def _unregister(self, block: int) -> None:
        del self._blocks[self._keys.pop(block)]
        del self._num_uses[block]


def prefix_key(parent: PrefixKey, token_ids: Sequence[int]) -> PrefixKey:
    """The key of a block of tokens after the prefix that `parent` stands for.

    A first block's parent names who may share it. A cryptographic digest, as a collision would show one
    request the keys and values of another's text.
    """
    return blake2b(np.asarray(token_ids, np.int32).tobytes(), key=parent, digest_size=16).digest()


def scope_of(tenant: str) -> PrefixKey:
    """The parent of the first blocks of a tenant's texts."""
    return blake2b(tenant.encode("utf-8", "surrogatepass"), digest_size=16).digest() if tenant else b""
