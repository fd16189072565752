from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fastserve.data import Vocabulary, create_vocab
from fastserve.data.vocabulary import WordCounter
from fastserve.errors import DataError, OptionError

ROWS = [{"text": "b a b c"}, {"tokens": ["b", "New York"]}, {"source": "a c", "target": "中文"}]


def test_words_are_ranked_by_how_often_they_are_met() -> None:
    vocabulary = create_vocab(ROWS)
    assert vocabulary.words == ("<pad>", "<unk>", "<bos>", "<eos>", "b", "a", "c", "New York", "中", "文")
    assert create_vocab(ROWS, size=6).words[4:] == ("b", "a")
    assert create_vocab(ROWS, min_count=2).words[4:] == ("b", "a", "c")


def test_text_is_encoded_and_decoded_and_what_is_unknown_is_unk() -> None:
    vocabulary = create_vocab(ROWS)
    assert vocabulary.encode("a z b") == [5, 1, 4]
    assert vocabulary.decode([2, 5, 1, 4, 3]) == "a <unk> b"
    assert vocabulary.encode_words(["New York"]) == [7]


def test_a_vocabulary_is_what_it_was_after_saving(tmp_path: Path) -> None:
    vocabulary = create_vocab(ROWS, segmenter="characters")
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert (loaded.words, loaded.segmenter) == (vocabulary.words, "characters")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken.json is no vocabulary"):
        Vocabulary.load(tmp_path / "broken.json")


def test_words_that_are_twice_or_without_unk_are_refused() -> None:
    with pytest.raises(DataError, match="has 'a' twice"):
        Vocabulary(["<unk>", "a", "a"])
    with pytest.raises(DataError, match="has no '<unk>'"):
        Vocabulary(["a"])
    with pytest.raises(OptionError, match="size=4"):
        create_vocab(ROWS, size=4)


def test_counting_stays_within_its_bound_and_keeps_what_is_frequent() -> None:
    counter = WordCounter(max_counted=100)
    words = [f"rare{at}" if at % 3 else f"often{at % 10}" for at in range(30_000)]
    for start in range(0, len(words), 50):
        counter.update(words[start : start + 50])
        assert len(counter.counts) <= 100
    exact = Counter(word for word in words if word.startswith("often"))
    assert {word: counter.counts[word] for word in exact} == exact
    assert counter.num_forgotten > 19_000
