from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.data.tag_scheme import (
    SCHEMES,
    Span,
    convert_tags,
    detect_scheme,
    find_violation,
    fitting_schemes,
    read_spans,
    write_tags,
)
from fastserve.errors import DataError, OptionError


@st.composite
def sentences(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Entities that do not overlap, some of them side by side, in a sentence."""
    spans = []
    end = 0
    for gap, length, label in draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from(["PER", "LOC"])), max_size=6)
    ):
        spans.append(Span(end + gap, end + gap + length, label))
        end = spans[-1].end
    return spans, end + draw(st.integers(0, 2))


def has_neighbours(spans: list[Span]) -> bool:
    return any((one.end, one.label) == (other.start, other.label) for one, other in pairwise(spans))


@settings(deadline=None)  # it says how busy the machine is
@given(sentences(), st.sampled_from([scheme for scheme in SCHEMES if scheme != "io"]))
def test_what_is_written_in_a_scheme_is_of_it_and_reads_back(
    sentence: tuple[list[Span], int], scheme: str
) -> None:
    spans, num_tokens = sentence
    tags = write_tags(spans, num_tokens, scheme)
    assert find_violation(tags, scheme) is None
    assert read_spans(tags) == spans


@settings(deadline=None)  # it says how busy the machine is
@given(sentences(), st.sampled_from(SCHEMES), st.sampled_from(SCHEMES))
def test_converting_there_and_back_gives_the_same_tags(
    sentence: tuple[list[Span], int], source: str, target: str
) -> None:
    spans, num_tokens = sentence
    if has_neighbours(spans) and "io" in (source, target):
        return
    tags = write_tags(spans, num_tokens, source)
    assert convert_tags(convert_tags(tags, source, target), target, source) == tags


PREFIXES = st.sampled_from(["O", "B-X", "I-X", "E-X", "S-X", "M-X", "B-Y", "I-Y", "E-Y", "S-Y"])


@settings(deadline=None)  # it says how busy the machine is
@given(st.lists(PREFIXES, max_size=6))
def test_a_sentence_fits_a_scheme_just_where_writing_its_entities_gives_it_again(tags: list[str]) -> None:
    # The second implementation: a scheme has one way to write each set of entities.
    rewritten = {scheme for scheme in SCHEMES if write_tags(read_spans(tags), len(tags), scheme) == tags}
    assert fitting_schemes(tags) == rewritten


def test_the_schemes_write_one_sentence_as_the_literature_does() -> None:
    spans = [Span(0, 2, "PER"), Span(2, 3, "PER"), Span(4, 7, "ORG")]
    expected = {
        "io": "I-PER I-PER I-PER O I-ORG I-ORG I-ORG",
        "iob1": "I-PER I-PER B-PER O I-ORG I-ORG I-ORG",
        "iob2": "B-PER I-PER B-PER O B-ORG I-ORG I-ORG",
        "iobes": "B-PER E-PER S-PER O B-ORG I-ORG E-ORG",
        "bmes": "B-PER E-PER S-PER O B-ORG M-ORG E-ORG",
    }
    assert {scheme: " ".join(write_tags(spans, 7, scheme)) for scheme in SCHEMES} == expected


@pytest.mark.parametrize("scheme", ["iob1", "iob2", "iobes", "bmes"])
def test_the_scheme_of_a_file_is_told_by_its_tags(scheme: str) -> None:
    spans = [Span(0, 3, "PER"), Span(3, 4, "PER"), Span(5, 7, "ORG")]
    assert detect_scheme([write_tags(spans, 8, scheme), ["O", "O"]]) == scheme


def test_tags_of_no_one_scheme_are_an_error() -> None:
    with pytest.raises(DataError, match="iob2 fits most sentences, but not 1"):
        detect_scheme([["B-X", "I-X"], ["B-X", "O"], ["S-X", "O"]])


def test_io_does_not_join_two_entities_in_silence() -> None:
    with pytest.raises(DataError, match="io would join two entities 'X' at token 1"):
        convert_tags(["B-X", "B-X"], "iob2", "io")


@pytest.mark.parametrize("tag", ["B", "B-", "PER", "", "Q-X", "b-X", "o"])
def test_what_is_no_tag_is_a_violation_of_every_scheme(tag: str) -> None:
    assert not fitting_schemes(["O", tag])


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(OptionError, match="tag_scheme='iob3' is unknown"):
        write_tags([], 1, "iob3")
