from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.text import CompletionText


class PieceDecoder:
    """Token n is pieces[n]; `rest` is held back until the end."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces = pieces
        self._rest = rest

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def finish(self) -> str:
        return self._rest


def read(pieces: list[str], stop: list[str], rest: str = "") -> tuple[list[str], bool]:
    """The texts that come out token by token, and whether a stop string ended them."""
    text = CompletionText(PieceDecoder(pieces, rest), stop)
    out: list[str] = []
    for index in range(len(pieces)):
        out.append(text.push(index))
        if text.has_stopped:
            break
    out.append(text.finish())
    return out, text.has_stopped


def test_without_stop_strings_every_piece_comes_out_at_once() -> None:
    assert read(["one", " two"], []) == (["one", " two", ""], False)


def test_text_before_a_stop_string_is_kept_and_the_stop_string_removed() -> None:
    assert read(["Hello wor", "ld\n\nUser: hi"], ["\n\nUser:"]) == (["Hello wor", "ld", ""], True)


def test_a_stop_string_across_tokens_is_found_and_nothing_of_it_comes_out_before() -> None:
    assert read(["a", "<", "|e", "nd", "|>b"], ["<|end|>"]) == (["a", "", "", "", "", ""], True)


def test_what_was_held_back_comes_out_once_it_cannot_be_a_stop_string() -> None:
    assert read(["a<", "|", "no"], ["<|end|>"]) == (["a", "", "<|no", ""], False)


def test_what_is_held_back_at_the_end_comes_out_there() -> None:
    assert read(["a", "<|en"], ["<|end|>"]) == (["a", "", "<|en"], False)


def test_a_stop_string_completed_by_the_decoders_rest_still_stops() -> None:
    assert read(["ab", "c"], ["cd"], rest="de") == (["ab", "", ""], True)


def test_a_repeated_beginning_does_not_hide_the_stop_string() -> None:
    assert read(["a", "a", "a", "b"], ["aab"]) == (["", "", "a", "", ""], True)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert "".join(read(["xabc"], ["abc", "b"])[0]) == "xa"
    assert "".join(read(["xabc"], ["c", "abc"])[0]) == "x"


@given(st.text("ab<", max_size=12), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3), st.data())
def test_the_text_does_not_depend_on_where_tokens_begin_and_end(text: str, stop: list[str], data) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    by_letter, stopped_by_letter = read(list(text), stop)
    by_token, stopped_by_token = read(pieces, stop)
    assert "".join(by_token) == "".join(by_letter)
    assert stopped_by_token == stopped_by_letter == any(s in text for s in stop)
    assert text.startswith("".join(by_token))


def test_the_decoder_reads_the_prompt_first_so_that_the_completion_goes_on_where_it_ends() -> None:
    class SpacingDecoder(PieceDecoder):
        is_first = True

        def push(self, token_id: int) -> str:
            piece = super().push(token_id)
            piece, self.is_first = piece if self.is_first else f" {piece}", False
            return piece

    pieces = ["once", "upon"]
    assert CompletionText(SpacingDecoder(pieces)).push(1) == "upon"
    assert CompletionText(SpacingDecoder(pieces), prompt_ids=[0]).push(1) == " upon"
