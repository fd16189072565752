from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.data import pack_sequences
from fastserve.data.pack import PACKINGS
from fastserve.errors import OptionError

SEQUENCES = st.lists(st.integers(0, 25).map(lambda length: list(range(length))), max_size=40)


@settings(deadline=None)  # it says how busy the machine is
@given(SEQUENCES, st.integers(2, 16), st.sampled_from(PACKINGS), st.booleans())
def test_packs_hold_every_token_once_and_are_no_longer_than_may_be(
    sequences: list[list[int]], length: int, how: str, has_end: bool
) -> None:
    packs = list(pack_sequences(sequences, length, how=how, eos_id=99 if has_end else None))
    expected = Counter(token for ids in sequences for token in ids)
    if has_end and any(sequences):
        expected[99] = sum(map(bool, sequences))
    assert Counter(token for pack in packs for token in pack.input_ids) == expected
    for pack in packs:
        assert sum(pack.lengths) == len(pack.input_ids) <= length
        assert 0 not in pack.lengths


@settings(deadline=None)  # it says how busy the machine is
@given(SEQUENCES, st.integers(2, 16))
def test_concatenation_leaves_only_the_last_pack_short_and_keeps_the_order(
    sequences: list[list[int]], length: int
) -> None:
    packs = list(pack_sequences(sequences, length, how="concatenate"))
    assert [token for pack in packs for token in pack.input_ids] == [
        token for ids in sequences for token in ids
    ]
    assert all(len(pack.input_ids) == length for pack in packs[:-1])


@settings(deadline=None)  # it says how busy the machine is
@given(SEQUENCES, st.integers(8, 16))
def test_best_fit_cuts_no_sequence_that_fits(sequences: list[list[int]], length: int) -> None:
    packs = list(pack_sequences(sequences, length, how="best-fit"))
    whole = Counter(len(ids) for ids in sequences if 0 < len(ids) <= length)
    found = Counter(number for pack in packs for number in pack.lengths)
    assert all(found[number] >= count for number, count in whole.items())


def test_best_fit_fills_more_than_padding_would() -> None:
    sequences = [[0] * (1 + at * 37 % 100) for at in range(1000)]
    packs = list(pack_sequences(sequences, 128))
    assert sum(map(len, sequences)) / (128 * len(packs)) > 0.98


def test_a_length_without_room_is_refused_before_anything_is_read() -> None:
    with pytest.raises(OptionError, match="pack=1"):
        pack_sequences([], 1)
