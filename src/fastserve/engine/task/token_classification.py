"""A tag for each word of a text, and the entities that the tags spell."""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from fastserve.checkpoint.tokenizer import Encoding
from fastserve.engine.load import LoadedModel
from fastserve.engine.probability import shares_of
from fastserve.engine.task.prepared import Prepared
from fastserve.engine.task.window import Window, cut, stride_of
from fastserve.models.task import TaskSettings
from fastserve.types import Float32Array, Float64Array

_WORD = re.compile(r"\w+|[^\w\s]")
# Blocks of the Unicode standard whose scripts write no spaces between words: Thai and Lao, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]"
)
_PREFIXES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}


class Entity(TypedDict, total=False):
    """Where it is: in a text by characters, text[start:end], with that `text`; among given words by their
    indices, words[first_token:end_token]. `score` is the mean of its words' probabilities."""

    label: str
    score: float
    start: int
    end: int
    text: str
    first_token: int
    end_token: int


class Tagging(TypedDict):
    """`tags` and their `scores`, one for each of `tokens`."""

    entities: list[Entity]
    tokens: list[str]
    tags: list[str]
    scores: list[float]


def prepare_tags(model: LoadedModel, text: str | Seq[str], *, stride: int | None = None) -> Prepared[Tagging]:
    """Tag the words of a text, or words as they are given. A word's tag is that of its first token.

    A text longer than the model's limit is cut into windows; a word that two have counts where there is more
    around it.

    Args:
        stride: tokens that neighbouring windows share; None: as the model was trained, or 64; a
            fourth of the model's limit at most.
    """
    offsets = word_offsets(text) if isinstance(text, str) else None
    words: list[str] = list(text)
    if isinstance(text, str) and offsets is not None:
        words = [text[start:end] for start, end in offsets]
    if not words:
        return Prepared([], lambda _: {"entities": [], "tokens": [], "tags": [], "scores": []})
    parts = [_Part.of(member, words, stride) for member in model.members]

    def finish(logits: Seq[Float32Array]) -> Tagging:
        found = _read(model, len(words), parts, logits)
        return _tagging(model.settings, words, found, text if isinstance(text, str) else None, offsets)

    return Prepared([window.input for part in parts for window in part.windows], finish)


@dataclass(frozen=True, slots=True)
class _Part:
    """What a member of an ensemble reads of a text; of another model all there is."""

    windows: Seq[Window]
    first_tokens: dict[int, int]

    @classmethod
    def of(cls, model: LoadedModel, words: Seq[str], stride: int | None) -> _Part:
        encoding = model.tokenizer.encode_with_origin(words)
        if stride is None:
            stride = stride_of(model)
        windows = cut(model, encoding, part=0, stride=min(stride, model.reading_length // 4))
        return cls(windows, _first_tokens(encoding))


def _read(
    model: LoadedModel, num_words: int, parts: Seq[_Part], logits: Seq[Float32Array]
) -> dict[int, Float64Array]:
    """By word, the probabilities of its tags. A member whose tokenizer drops all of a word leaves it open."""
    said: list[dict[int, Float64Array]] = []
    start = 0
    for member, part in zip(model.members, parts, strict=True):
        end = start + len(part.windows)
        rows = _best_rows(part.first_tokens, part.windows, logits[start:end])
        said.append({word: shares_of(member.settings, row) for word, row in rows.items()})
        start = end
    if model.ensemble is None:
        return said[0]
    num_labels = len(model.settings.labels)
    is_open = np.full(num_labels, 1 / num_labels)
    mixed = model.ensemble.mix(
        [np.stack([found.get(word, is_open) for word in range(num_words)]) for found in said]
    )
    return {word: mixed[word] for word in range(num_words) if any(word in found for found in said)}


def word_offsets(text: str) -> list[tuple[int, int]]:
    """Where the words of a text are: runs of letters and digits, other characters alone, and each character
    of a script without spaces.

    >>> word_offsets("Hi, 北京")
    [(0, 2), (2, 3), (4, 5), (5, 6)]
    """
    offsets = []
    for match in _WORD.finditer(text):
        start = match.start()
        for alone in _UNSPACED.finditer(text, match.start(), match.end()):
            offsets += [(start, alone.start())] * (start < alone.start())
            offsets.append(alone.span())
            start = alone.end()
        offsets += [(start, match.end())] * (start < match.end())
    return offsets


def entities_of_tags(tags: Seq[str], tag_scheme: str | None = None) -> list[tuple[int, int, str]]:
    """First word, the one behind the last, and label of each entity that tags spell, in any of IO, IOB1,
    IOB2, IOBES (E or L, S or U) and BMES.

    A sequence that its scheme does not have is read as conlleval and seqeval do: an entity begins where none
    of its label goes on.

    >>> entities_of_tags(["B-PER", "I-PER", "O", "I-LOC", "S-ORG"])
    [(0, 2, 'PER'), (3, 4, 'LOC'), (4, 5, 'ORG')]
    """
    found: list[tuple[int, int, str]] = []
    start, label, before = 0, "", "O"
    for index, tag in enumerate([*tags, "O"]):
        prefix, name = _split_tag(tag, tag_scheme)
        begins = prefix in ("B", "S") or name != label or before in ("E", "S")
        if label and (prefix == "O" or begins):
            found.append((start, index, label))
            label = ""
        if prefix != "O" and begins:
            start, label = index, name
        before = prefix
    return found


def _split_tag(tag: str, tag_scheme: str | None) -> tuple[str, str]:
    """One of B I E S O, and the label; a tag that is a label alone is inside of it."""
    if tag in ("O", ""):
        return "O", ""
    prefix, dash, name = tag.partition("-")
    if tag_scheme == "io" and prefix != "I":  # a label may have a dash of its own
        return "I", tag
    if not dash or prefix not in _PREFIXES:
        return "I", tag
    return _PREFIXES[prefix], name


def _first_tokens(encoding: Encoding) -> dict[int, int]:
    """By the index of a token, the word of which it is the first."""
    first: dict[int, int] = {}
    before = None
    for index, word in enumerate(encoding.words):
        if word is not None and word != before:
            first[index] = word
        before = word
    return first


def _best_rows(
    first_tokens: dict[int, int], windows: Seq[Window], logits: Seq[Float32Array]
) -> dict[int, Float32Array]:
    """By word, the logits of its first token, from the window in which that is farther from the ends."""
    best: dict[int, tuple[int, Float32Array]] = {}
    for window, rows in zip(windows, logits, strict=True):
        for place, token in enumerate(window.tokens):
            word = first_tokens.get(token)
            if word is None:
                continue
            room = min(place, len(window.tokens) - place)
            if word not in best or room > best[word][0]:
                best[word] = room, rows[place]
    return {word: row for word, (_, row) in best.items()}


def _tagging(
    settings: TaskSettings,
    words: list[str],
    found: dict[int, Float64Array],
    text: str | None,
    offsets: Seq[tuple[int, int]] | None,
) -> Tagging:
    # A word without tokens (of characters that the tokenizer drops) has no tag of its own.
    tags, scores = ["O"] * len(words), [1.0] * len(words)
    for word, shares in found.items():
        best = int(shares.argmax())
        tags[word], scores[word] = settings.labels[best], float(shares[best])
    entities: list[Entity] = []
    for first, end, label in entities_of_tags(tags, settings.tag_scheme):
        entity: Entity = {"label": label, "score": float(np.mean(scores[first:end]))}
        if text is None or offsets is None:
            entity |= {"first_token": first, "end_token": end}
        else:
            start, stop = offsets[first][0], offsets[end - 1][1]
            entity |= {"start": start, "end": stop, "text": text[start:stop]}
        entities.append(entity)
    return {"entities": entities, "tokens": words, "tags": tags, "scores": scores}
