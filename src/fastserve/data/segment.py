"""Cutting texts into words: Chinese by jieba, others by their letters, any by a model's tokenizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fastserve.data.problem import ProblemLog
from fastserve.data.row import TEXT_FIELDS, Row
from fastserve.data.tag_scheme import Span, write_tags
from fastserve.errors import OptionError, UnsupportedError
from fastserve.option import check_choice

if TYPE_CHECKING:
    import tokenizers

SEGMENTERS = ("words", "characters", "jieba")
MODEL_TOKENIZER = "tokenizer"  # what a row is segmented by where a model is named

# Han, kana, Thai, Lao, Khmer and Burmese have no space between words: each character is one.
_NO_SPACE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_NO_SPACE}]|[^\W{_NO_SPACE}]+(?:['’][^\W\d_{_NO_SPACE}]+)*|[^\w\s]")


class Word(NamedTuple):
    """A word and its place: characters `start` to `end`, which is exclusive."""

    text: str
    start: int
    end: int


class Segmenter(Protocol):
    """Cuts a text into words, in order, that do not overlap and are never space."""

    def __call__(self, text: str) -> list[Word]: ...


def open_segmenter(name: str) -> Segmenter:
    """The segmenter of a name: `words` (letters together, signs each), `characters`, or `jieba`.

    >>> [word.text for word in open_segmenter("words")("Don't go, 你好!")]
    ["Don't", 'go', ',', '你', '好', '!']

    Raises:
        OptionError: no segmenter has that name.
        UnsupportedError: jieba is not installed.
    """
    check_choice("segment", name, SEGMENTERS)
    if name == "words":
        return _segment_words
    if name == "characters":
        return _segment_characters
    return _open_jieba()


def tokenizer_segmenter(tokenizer: tokenizers.Tokenizer) -> Segmenter:
    """The tokens of a tokenizer, as they stand in the text, without special ones."""

    def segment(text: str) -> list[Word]:
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        words = []
        end = 0
        for start, stop in offsets:
            start = max(start, end)  # bytes of one character may be several tokens
            inside = text[start:stop]
            if inside.strip():
                start += len(inside) - len(inside.lstrip())
                words.append(Word(inside.strip(), start, start + len(inside.strip())))
                end = stop
        return words

    return segment


def segment_row(row: Row, segment: Segmenter, log: ProblemLog, *, tag_scheme: str = "iob2") -> Row:
    """A row whose texts are cut: {"text", "entities"} become {"tokens", "tags"}, head and tail are told by
    tokens, other texts have a space between words. Words are cut where an entity begins or ends.

    Raises:
        OptionError: the row has answers, which are told by characters.
    """
    if "answers" in row:
        raise OptionError(
            "answers are told by characters of their context, which segmenting would move",
            hint="leave --segment out for question-answering",
            option="segment",
        )
    fields = dict(row)
    spans = [*row.get("entities", ()), *(row[name] for name in ("head", "tail") if name in row)]
    if "text" in row and ("entities" in row or "head" in row):
        words = segment_around(row["text"], segment, spans)
        del fields["text"]
        fields = {"tokens": [word.text for word in words], **fields}
        if "entities" in row:
            tagged = [Span(*_words_of(entity, words), entity["label"]) for entity in fields.pop("entities")]
            fields["tags"] = write_tags(tagged, len(words), tag_scheme)
        for name in ("head", "tail"):
            if name in row:
                start, end = _words_of(row[name], words)
                fields[name] = {"start": start, "end": end}
        return row.with_fields(fields)
    for field in TEXT_FIELDS:
        if isinstance(row.get(field), str):
            fields[field] = _spaced(row[field], segment)
    if "choices" in row:
        fields["choices"] = [_spaced(choice, segment) for choice in row["choices"]]
    if "messages" in row:
        fields["messages"] = [
            {**message, "content": _spaced(message["content"], segment)} for message in row["messages"]
        ]
    return row.with_fields(fields)


def segment_around(text: str, segment: Segmenter, spans: Sequence[dict[str, Any]]) -> list[Word]:
    """Words of a text, none of which lies across the beginning or end of a span."""
    cuts = sorted({0, len(text), *(span[end] for span in spans for end in ("start", "end"))})
    words = []
    for start, end in pairwise(cuts):
        for word in segment(text[start:end]):
            words.append(Word(word.text, word.start + start, word.end + start))
    return words


def _words_of(span: dict[str, Any], words: Sequence[Word]) -> tuple[int, int]:
    inside = [index for index, word in enumerate(words) if span["start"] <= word.start < span["end"]]
    return inside[0], inside[-1] + 1


def _spaced(text: str, segment: Segmenter) -> str:
    return "\n".join(" ".join(word.text for word in segment(line)) for line in text.split("\n"))


def _segment_words(text: str) -> list[Word]:
    return [Word(match[0], *match.span()) for match in _WORD.finditer(text)]


def _segment_characters(text: str) -> list[Word]:
    return [Word(character, at, at + 1) for at, character in enumerate(text) if not character.isspace()]


def _open_jieba() -> Segmenter:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for pkg_resources, which warns that it goes
            import jieba
    except ImportError as error:
        raise UnsupportedError(
            f"words of Chinese text need jieba: {error}", hint="pip install 'fastserve-llm[data]'"
        ) from error
    jieba.setLogLevel("WARNING")  # it tells on standard error that it reads its dictionary

    def segment(text: str) -> list[Word]:
        return list(_without_space(jieba.tokenize(text)))

    return segment


def _without_space(words: Iterator[tuple[str, int, int]]) -> Iterator[Word]:
    for text, start, end in words:
        if text.strip():
            yield Word(text, start, end)
