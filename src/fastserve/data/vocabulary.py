"""Words by number: counting them in bounded memory, and a vocabulary of those met most often."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastserve.data.row import texts_of
from fastserve.data.segment import Segmenter, open_segmenter
from fastserve.errors import DataError
from fastserve.option import check_integer

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
_MAX_COUNTED = 2_000_000


class WordCounter:
    """Counts words in bounded memory: when more than `max_counted` are known, those met least are forgotten,
    as lossy counting does (Manku and Motwani 2002). `num_forgotten` says how many times that was."""

    def __init__(self, max_counted: int = _MAX_COUNTED) -> None:
        self._max_counted = max_counted
        self.counts: Counter[str] = Counter()
        self.num_forgotten = 0
        self._least = 1

    def update(self, words: Iterable[str]) -> None:
        self.counts.update(words)
        while len(self.counts) > self._max_counted:
            rare = [word for word, number in self.counts.items() if number <= self._least]
            for word in rare:
                del self.counts[word]
            self.num_forgotten += len(rare)
            if len(rare) < self._max_counted // 10:
                self._least += 1


class Vocabulary:
    """Words and their ids, from 0; the special ones first. `<unk>` stands for every other word.

    >>> vocabulary = create_vocab([{"text": "a b a"}])
    >>> vocabulary.encode("a c"), vocabulary.decode([4, 5])
    ([4, 1], 'a b')

    Raises:
        DataError: a word occurs twice, or `<unk>` is none of them.
    """

    def __init__(self, words: Sequence[str], *, segmenter: str = "words") -> None:
        self.words = tuple(words)
        self.segmenter = segmenter
        self.ids = {word: index for index, word in enumerate(words)}
        if len(self.ids) < len(words):
            repeated = next(word for word, number in Counter(words).items() if number > 1)
            raise DataError(f"the vocabulary has {repeated!r} twice", hint="leave one out")
        if "<unk>" not in self.ids:
            raise DataError(
                "the vocabulary has no '<unk>'", hint="add it for the words that it does not have"
            )
        self._segment = open_segmenter(segmenter)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """The ids of a text's words, cut as they were for counting."""
        return self.encode_words([word.text for word in self._segment(text)])

    def encode_words(self, words: Sequence[str]) -> list[int]:
        unknown = self.ids["<unk>"]
        return [self.ids.get(word, unknown) for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ids, with a space between them; special ones but `<unk>` are left out."""
        skipped = {self.ids[word] for word in SPECIALS if word in self.ids and word != "<unk>"}
        return " ".join(self.words[index] for index in ids if index not in skipped)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as JSON: {"segmenter", "words"}."""
        document = {"segmenter": self.segmenter, "words": self.words}
        Path(path).write_text(json.dumps(document, ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            DataError: it is no such file.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(document["words"], segmenter=document["segmenter"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no vocabulary: {error}", hint="write it with save") from error


def create_vocab(
    rows: Iterable[Mapping[str, Any]],
    *,
    size: int | None = None,
    min_count: int = 1,
    segmenter: str = "words",
    specials: Sequence[str] = SPECIALS,
) -> Vocabulary:
    """A vocabulary of the words of rows, those met most often first, equal ones in alphabetical order.

    Args:
        rows: of any task; all their texts count. Tokens are words as they are.
        size: the most words, special ones included; None keeps all.
        min_count: how often a word is met at least.
        segmenter: how texts are cut: words, characters, jieba.
        specials: words that stand first.

    Raises:
        OptionError: an option is out of range.
        UnsupportedError: jieba is asked for, and is not installed.
    """
    if size is not None:
        check_integer("size", size, low=len(specials) + 1)
    check_integer("min_count", min_count, low=1)
    counter = WordCounter()
    for words in words_of_rows(rows, open_segmenter(segmenter)):
        counter.update(words)
    return choose_words(counter, size=size, min_count=min_count, segmenter=segmenter, specials=specials)


def choose_words(
    counter: WordCounter,
    *,
    size: int | None = None,
    min_count: int = 1,
    segmenter: str = "words",
    specials: Sequence[str] = SPECIALS,
) -> Vocabulary:
    """The vocabulary of the words that were counted. See `create_vocab`."""
    known = set(specials)
    ranked = sorted(counter.counts.items(), key=lambda item: (-item[1], item[0]))
    words = [word for word, number in ranked if number >= min_count and word not in known]
    kept = words if size is None else words[: size - len(specials)]
    return Vocabulary([*specials, *kept], segmenter=segmenter)


def words_of_rows(rows: Iterable[Mapping[str, Any]], segment: Segmenter) -> Iterator[list[str]]:
    """The words of each row."""
    for row in rows:
        if "tokens" in row:
            yield list(row["tokens"])
        else:
            yield [word.text for text in texts_of(row) for word in segment(text)]
