from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.data import AugmentOptions, augment_data, read_synonyms
from fastserve.data.tag_scheme import read_spans
from fastserve.errors import DataError, OptionError

SYNONYMS = {"good": ["fine", "very nice"], "film": ["movie"], "paris": ["London"]}
ALL = AugmentOptions(copies=3, synonyms=SYNONYMS, synonym_ratio=0.7, noise_ratio=0.5, swap_ratio=0.5)
WORDS = st.lists(
    st.sampled_from(["good", "film", "Paris", "is", "wonderful", ",", "in"]), min_size=1, max_size=12
)


@settings(deadline=None)  # it says how busy the machine is
@given(WORDS, st.data())
def test_entities_of_a_text_keep_their_words(words: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(words) - 1))
    end = data.draw(st.integers(start + 1, len(words)))
    before = " ".join(words[:start])
    begins = len(before) + (start > 0)
    inside = " ".join(words[start:end])
    row = {
        "text": " ".join(words),
        "entities": [{"start": begins, "end": begins + len(inside), "label": "X"}],
    }
    for variant in augment_data([row], ALL):
        (entity,) = variant["entities"]
        assert variant["text"][entity["start"] : entity["end"]] == inside
        assert variant["text"] != row["text"]


@settings(deadline=None)  # it says how busy the machine is
@given(WORDS, st.data())
def test_tags_and_arguments_of_tokens_keep_theirs(words: list[str], data: st.DataObject) -> None:
    tags = [data.draw(st.sampled_from(["O", "B-X"])) for _ in words]
    row: dict[str, Any] = {"tokens": words, "tags": tags}
    entities = [words[span.start : span.end] for span in read_spans(tags)]
    for variant in augment_data([row], ALL):
        assert variant["tags"] == tags
        assert [variant["tokens"][span.start : span.end] for span in read_spans(tags)] == entities
        assert len(variant["tokens"]) == len(words)
    related = {
        "tokens": words,
        "head": {"start": 0, "end": 1},
        "tail": {"start": len(words) - 1, "end": len(words)},
    }
    for variant in augment_data([related], ALL):
        assert (variant["tokens"][0], variant["tokens"][-1]) == (words[0], words[-1])


def test_each_way_of_varying_does_what_it_says() -> None:
    row = {"text": "A Good film, wonderful acting", "label": 1, "id": "r1"}
    (variant,) = augment_data([row], AugmentOptions(synonyms={"good": ["fine"]}, synonym_ratio=1))
    assert variant == {
        "text": "A Fine film, wonderful acting",
        "label": 1,
        "id": "r1-augmented-1",
        "augmented": 1,
    }
    (variant,) = augment_data([row], AugmentOptions(swap_ratio=1))
    assert variant["text"] == "Good A film, acting wonderful"
    (variant,) = augment_data([row], AugmentOptions(noise_ratio=1))
    changed = [
        (one, other)
        for one, other in zip(row["text"].split(), variant["text"].split(), strict=True)  # type: ignore[attr-defined]
        if one != other
    ]
    assert 1 <= len(changed) <= 4
    assert all(one[0] == other[0] and abs(len(one) - len(other)) <= 1 for one, other in changed)


def test_questions_vary_and_their_contexts_do_not() -> None:
    row = {
        "context": "good film",
        "question": "good film ?",
        "answers": {"text": ["good"], "answer_start": [0]},
    }
    (variant,) = augment_data([row], AugmentOptions(synonyms={"good": ["fine"]}, synonym_ratio=1))
    assert (variant["context"], variant["question"]) == ("good film", "fine film ?")


def test_variants_depend_on_the_seed_and_the_row_alone() -> None:
    rows = [{"text": "good film is wonderful in Paris", "label": 0, "number": at} for at in range(20)]
    whole = augment_data(rows, ALL)
    random.seed(5)
    assert augment_data(rows[7:8], ALL) == [variant for variant in whole if variant["number"] == 7]
    assert augment_data(rows, ALL) == whole
    other = AugmentOptions(synonyms=SYNONYMS, synonym_ratio=0.7, noise_ratio=0.5, seed=1)
    assert augment_data(rows, other) != whole


def test_synonyms_are_read_from_lines_and_json_and_mistakes_are_named(tmp_path: Path) -> None:
    lines, document = tmp_path / "words.txt", tmp_path / "words.json"
    lines.write_text("big\tlarge\thuge\n\nBig\tgreat\n")
    assert read_synonyms(lines)["big"] == ["large", "huge", "great"]
    assert read_synonyms(lines)["huge"] == ["big", "large"]
    document.write_text('{"Big": ["large"]}')
    assert read_synonyms(document) == {"big": ["large"]}
    lines.write_text("big\tlarge\nalone\n")
    with pytest.raises(DataError, match=r"words.txt:2: two words or more"):
        read_synonyms(lines)
    document.write_text('{"big": "large"}')
    with pytest.raises(DataError, match=r"words.json is no object of lists"):
        read_synonyms(document)


def test_nothing_to_vary_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing is to be varied"):
        AugmentOptions()
