from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.block import BlockPool


def test_a_block_is_never_owned_twice() -> None:
    pool = BlockPool(num_blocks=5, block_size=4)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_the_last_block_of_a_sequence_may_be_partly_filled(tokens: int, blocks: int) -> None:
    assert BlockPool(num_blocks=8, block_size=4).blocks_for(tokens) == blocks


def test_freeing_a_block_twice_is_caught() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_more_blocks_than_are_free_are_refused() -> None:
    with pytest.raises(AssertionError, match="3 blocks asked, 2 free"):
        BlockPool(num_blocks=2, block_size=4).allocate(3)


@given(st.lists(st.integers(0, 6)), st.randoms(use_true_random=False))
def test_any_stream_of_allocations_and_frees_keeps_every_block_free_or_owned_once(
    sizes: list[int], random
) -> None:
    pool = BlockPool(num_blocks=16, block_size=4)
    owned: list[list[int]] = []
    for size in sizes:
        if size <= pool.num_free:
            owned.append(pool.allocate(size))
        elif owned:
            pool.free(owned.pop(random.randrange(len(owned))))
        pool.check_invariants()
        flat = [block for blocks in owned for block in blocks]
        assert len(set(flat)) == len(flat)
        assert len(flat) + pool.num_free == 16
