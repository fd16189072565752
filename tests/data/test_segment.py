from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.data import train_tokenizer
from fastserve.data.problem import ProblemLog
from fastserve.data.row import Row
from fastserve.data.segment import open_segmenter, segment_row, tokenizer_segmenter
from fastserve.data.tag_scheme import read_spans
from fastserve.errors import OptionError


@settings(deadline=None)  # it says how busy the machine is
@given(st.text(max_size=40), st.sampled_from(["words", "characters"]))
def test_words_are_what_stands_at_their_places_and_nothing_but_space_is_between(text: str, name: str) -> None:
    words = open_segmenter(name)(text)
    end = 0
    for word in words:
        assert word.text == text[word.start : word.end]
        assert not text[end : word.start].strip()
        end = word.end
    assert not text[end:].strip()


def test_jieba_finds_chinese_words() -> None:
    words = open_segmenter("jieba")("我来到北京清华大学 OK")
    assert [word.text for word in words] == ["我", "来到", "北京", "清华大学", "OK"]
    assert words[-1].start == 10


def test_a_tokenizer_segments_into_its_tokens() -> None:
    tokenizer = train_tokenizer(["low lower lowest 低い"] * 50, vocab_size=300)
    text = "lowest low 低"
    words = tokenizer_segmenter(tokenizer)(text)
    assert all(word.text == text[word.start : word.end] for word in words)
    assert "".join(word.text for word in words) == text.replace(" ", "")


@settings(deadline=None)  # it says how busy the machine is
@given(st.data())
def test_entities_become_tags_that_say_the_same(data: st.DataObject) -> None:
    text = data.draw(st.text("ab中 ,", min_size=1, max_size=20))
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
    entities = [
        {"start": start, "end": end, "label": "X"}
        for start, end in zip(places[::2], places[1::2], strict=False)
        if text[start:end].strip() == text[start:end]
    ]
    row = segment_row(Row({"text": text, "entities": entities}), open_segmenter("words"), ProblemLog())
    spans = read_spans(row["tags"])
    found = ["".join(row["tokens"][span.start : span.end]) for span in spans]
    assert found == [text[entity["start"] : entity["end"]].replace(" ", "") for entity in entities]


def test_arguments_are_told_by_tokens() -> None:
    row = Row(
        {
            "text": "Ann met Bob.",
            "head": {"start": 0, "end": 3},
            "tail": {"start": 8, "end": 11},
            "label": "r",
        }
    )
    assert segment_row(row, open_segmenter("words"), ProblemLog()) == {
        "tokens": ["Ann", "met", "Bob", "."],
        "head": {"start": 0, "end": 1},
        "tail": {"start": 2, "end": 3},
        "label": "r",
    }


def test_other_texts_get_a_space_between_words_and_answers_are_refused() -> None:
    row = segment_row(Row({"source": "你好!", "target": "Hi!\nYou"}), open_segmenter("words"), ProblemLog())
    assert row == {"source": "你 好 !", "target": "Hi !\nYou"}
    with pytest.raises(OptionError, match="answers are told by characters"):
        segment_row(Row({"context": "a", "answers": {}}), open_segmenter("words"), ProblemLog())
