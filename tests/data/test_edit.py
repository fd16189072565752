from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.data.edit import Edit, apply_edits, move_offset


@st.composite
def edited_texts(draw: st.DrawFn) -> tuple[str, list[Edit]]:
    """A text, and edits of it in order."""
    text = draw(st.text("abc ", max_size=12))
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pairs = list(zip(places[::2], places[1::2], strict=False))
    return text, [Edit(start, end, draw(st.text("XY", max_size=3))) for start, end in pairs]


@settings(deadline=None)  # it says how busy the machine is
@given(edited_texts(), st.integers(0, 12), st.integers(0, 12))
def test_a_span_that_no_edit_touches_has_the_same_text_after(
    edited: tuple[str, list[Edit]], start: int, length: int
) -> None:
    text, edits = edited
    start = min(start, len(text))
    end = min(start + length, len(text))
    if any(edit.start < end and edit.end > start for edit in edits) or start == end:
        return
    after = apply_edits(text, edits)
    moved = move_offset(edits, start, is_end=False), move_offset(edits, end, is_end=True)
    assert after[moved[0] : moved[1]].strip("XY") == text[start:end].strip("XY")
    assert text[start:end] in after[moved[0] : moved[1]]


@settings(deadline=None)  # it says how busy the machine is
@given(edited_texts())
def test_the_ends_of_a_text_are_the_ends_after(edited: tuple[str, list[Edit]]) -> None:
    text, edits = edited
    after = apply_edits(text, edits)
    assert move_offset(edits, 0, is_end=False) == 0
    assert move_offset(edits, len(text), is_end=True) == len(after)
