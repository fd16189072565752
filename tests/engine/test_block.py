from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.block import BlockPool, prefix_key


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
        flat = [block for blocks in owned for block in blocks]
        pool.check_invariants(flat)
        assert len(set(flat)) == len(flat)
        assert len(flat) + pool.num_free == 16


def keys_of(text: str, scope: bytes = b"") -> list[bytes]:
    """Prefix keys of a text's blocks of one letter each."""
    keys = [scope]
    for letter in text:
        keys.append(prefix_key(keys[-1], [ord(letter)]))
    return keys[1:]


def fill(pool: BlockPool, text: str, scope: bytes = b"") -> list[int]:
    """Blocks that hold a text, as a sequence leaves them."""
    blocks = pool.lookup(keys_of(text, scope))
    blocks += pool.allocate(len(text) - len(blocks))
    for block, key in zip(blocks, keys_of(text, scope), strict=True):
        pool.register(block, key)
    return blocks


def known(pool: BlockPool, text: str, scope: bytes = b"") -> int:
    return pool.num_known(keys_of(text, scope))[0]


def test_a_prefix_is_found_as_far_as_it_is_the_same() -> None:
    pool = BlockPool(num_blocks=8, block_size=1)
    blocks = fill(pool, "abcd")
    assert pool.lookup(keys_of("abxd")) == blocks[:2]
    assert [pool.is_shared(block) for block in blocks] == [True, True, False, False]
    pool.free(blocks)
    pool.free(blocks[:2])
    assert pool.num_free == 8
    assert pool.lookup(keys_of("abcde")) == blocks


def test_a_block_in_the_middle_of_another_text_is_not_a_prefix() -> None:
    pool = BlockPool(num_blocks=8, block_size=1)
    fill(pool, "abc")
    assert known(pool, "bc") == 0


def test_what_one_scope_has_computed_another_does_not_find() -> None:
    pool = BlockPool(num_blocks=8, block_size=1)
    fill(pool, "abc", scope=b"one")
    assert known(pool, "abc", scope=b"one") == 3
    assert known(pool, "abc", scope=b"other") == 0
    assert known(pool, "abc") == 0


def test_the_cache_takes_what_is_left_and_gives_its_oldest_prefixes_tail_first() -> None:
    pool = BlockPool(num_blocks=4, block_size=1)
    pool.free(fill(pool, "ab"))
    pool.free(fill(pool, "xy"))
    assert (pool.num_free, pool.num_cached) == (4, 4)
    pool.allocate(1)
    assert (known(pool, "ab"), known(pool, "xy")) == (1, 2)
    pool.allocate(2)
    assert (known(pool, "ab"), known(pool, "xy")) == (0, 1)


def test_lfu_keeps_what_is_used_often_though_it_was_used_long_ago() -> None:
    survivors = {}
    for eviction in ("lru", "lfu"):
        pool = BlockPool(num_blocks=2, block_size=1, eviction=eviction)
        for text in ("a", "a", "b"):
            pool.free(fill(pool, text))
        pool.allocate(1)
        survivors[eviction] = [text for text in "ab" if known(pool, text)]
    assert survivors == {"lru": ["b"], "lfu": ["a"]}


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
@given(st.lists(st.text("ab", max_size=6)), st.randoms(use_true_random=False))
def test_in_any_stream_of_texts_owners_and_keys_balance(eviction, texts: list[str], random) -> None:
    pool = BlockPool(num_blocks=12, block_size=1, eviction=eviction)
    owned: list[list[int]] = []
    for text in texts:
        while pool.num_free < len(text):
            pool.free(owned.pop(random.randrange(len(owned))))
        owned.append(fill(pool, text))
        pool.check_invariants([block for blocks in owned for block in blocks])
    for blocks in owned:
        pool.free(blocks)
    pool.check_invariants([])
    pool.forget()
    assert pool.num_cached == 0
    pool.check_invariants([])
