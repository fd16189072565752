from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.prompt_lookup import PromptLookup


def lookup_of(token_ids: list[int], *, least: int = 2, most: int = 4) -> PromptLookup:
    lookup = PromptLookup(least_ngram=least, most_ngram=most)
    assert lookup.read(token_ids) == []
    return lookup


def longest_match(token_ids: list[int], position: int, most: int) -> int:
    """How many tokens before a position are those at the end of the text."""
    length = 0
    while length < min(most, position) and token_ids[position - 1 - length] == token_ids[-1 - length]:
        length += 1
    return length


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 3), st.integers(0, 3))
def test_the_guess_is_what_followed_the_latest_of_the_longest_matches(token_ids, least, more) -> None:
    """Of few enough places that all are compared."""
    lookup = lookup_of(token_ids, least=least, most=least + more)
    matches = {p: longest_match(token_ids, p, least + more) for p in range(1, len(token_ids))}
    found = {p: length for p, length in matches.items() if length >= least}
    places = list(found)[-16:]
    assert lookup.has_guess == bool(places)
    if places:
        best = max(places, key=lambda p: (found[p], p))
        assert lookup.match_length == found[best]
        assert lookup.guess(1) == [token_ids[best]]


def test_a_place_that_agrees_is_kept_and_counts_as_longer() -> None:
    text = [1, 2, 3, 4, 5, 6, 9, 1, 2]
    lookup = lookup_of(text)
    for length, token_id in enumerate([3, 4, 5, 6], 2):
        text.append(token_id)
        assert lookup.read(text) == [(length, True)]
    assert lookup.match_length == 6
    assert lookup.guess(1) == [9]


def test_tokens_that_come_together_are_judged_one_by_one_up_to_the_first_wrong_one() -> None:
    text = [1, 2, 3, 4, 5, 6, 9, 1, 2]
    lookup = lookup_of(text)
    text += [3, 4, 7]
    assert lookup.read(text) == [(2, True), (3, True), (4, False)]
    assert not lookup.has_guess


def test_a_text_that_repeats_itself_is_guessed_to_go_on_repeating() -> None:
    assert lookup_of([5, 1, 2, 3, 1, 2, 3]).guess(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_text_without_a_repeated_ngram_gives_no_guess() -> None:
    assert not lookup_of([1, 2, 3, 4, 1, 3]).has_guess
    assert not lookup_of([1]).has_guess
    assert not lookup_of([]).has_guess


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.data())
def test_reading_in_parts_judges_the_same_guesses_as_reading_token_by_token(token_ids, data) -> None:
    start = data.draw(st.integers(0, len(token_ids)))
    cuts = sorted(data.draw(st.sets(st.integers(start, len(token_ids)))))
    one_by_one, in_parts = lookup_of(token_ids[:start]), lookup_of(token_ids[:start])
    single = [one_by_one.read(token_ids[:n]) for n in range(start + 1, len(token_ids) + 1)]
    for low, high in pairwise([start, *cuts]):
        before = in_parts.match_length, in_parts.has_guess
        judged = in_parts.read(token_ids[:high])
        assert len(judged) <= high - low
        assert judged == [] or before[1]
        assert all(is_right for _, is_right in judged[:-1])
        if in_parts.has_guess:
            assert in_parts.match_length >= 2
    assert all(len(judged) <= 1 for judged in single)
