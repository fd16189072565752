"""More rows from those there are: synonyms, typing errors, words that change places. Entities and arguments
stay as they are, whatever happens around them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fastserve.data.digest import value_key
from fastserve.data.edit import Edit, apply_edits, move_offset
from fastserve.data.row import Row
from fastserve.data.segment import Word, open_segmenter
from fastserve.errors import DataError, OptionError
from fastserve.option import INT64_MAX, check_integer, check_number

AUGMENTED_TASKS = (
    "text-classification",
    "pair-classification",
    "token-classification",
    "relation-extraction",
    "question-answering",
    "embedding",
)

# Keys beside each other on the keyboard of typewriters: what fingers mistake.
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


@dataclass(frozen=True, slots=True)
class AugmentOptions:
    """How rows are varied; the ratios are of words.

    Attributes:
        copies: variants of each row.
        synonyms: words and what may stand in their places, as `read_synonyms` gives them.
        synonym_ratio: words that become a synonym, of those that have one.
        noise_ratio: words with a typing error: a letter doubled, left out or mistaken, or two swapped.
        swap_ratio: words that change places with the next.
        seed: of everything that is drawn; a row's variants depend on it and the row alone.

    Raises:
        OptionError: an option is out of range, or nothing is to be varied.
    """

    copies: int = 1
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    synonym_ratio: float = 0.2
    noise_ratio: float = 0.0
    swap_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("copies", self.copies, low=1)
        check_integer("seed", self.seed, low=0, high=INT64_MAX)
        for name in ("synonym_ratio", "noise_ratio", "swap_ratio"):
            check_number(name, getattr(self, name), 0, 1)
        if not (self.synonyms and self.synonym_ratio) and not self.noise_ratio and not self.swap_ratio:
            raise OptionError(
                "nothing is to be varied: there are no synonyms, and noise_ratio and swap_ratio are 0",
                hint="give synonyms, or a ratio above 0",
                option="noise_ratio",
            )


def read_synonyms(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Synonyms of a file: JSON {"word": ["other", ...]}, or lines of words that mean the same, with tabs.

    Raises:
        DataError: it is missing or malformed; it names the line.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8: {error}", hint="give a file of synonyms") from error
    if file.suffix == ".json":
        try:
            document = json.loads(text)
        except ValueError as error:
            raise DataError(f"{file}: no JSON: {error}", hint="mend the file") from error
        is_right = isinstance(document, dict) and all(
            isinstance(others, list) and all(isinstance(other, str) and other for other in others)
            for others in document.values()
        )
        if not is_right:
            raise DataError(f"{file} is no object of lists of words", hint='such as {"big": ["large"]}')
        return {word.casefold(): list(others) for word, others in document.items()}
    synonyms: dict[str, list[str]] = {}
    for line, content in enumerate(text.split("\n"), start=1):
        words = [word.strip() for word in content.split("\t")]
        if not content.strip():
            continue
        if len(words) < 2 or not all(words):
            raise DataError(f"{file}:{line}: two words or more, parted by tabs, should be here")
        for word in words:
            known = synonyms.setdefault(word.casefold(), [])
            known += [other for other in words if other != word and other not in known]
    return synonyms


def augment_data(rows: Sequence[Mapping[str, Any]], options: AugmentOptions) -> list[Row]:
    """Variants of rows, those that came out different, with labels, tags and offsets. See `AugmentOptions`.

    >>> options = AugmentOptions(synonyms={"good": ["fine"]}, synonym_ratio=1)
    >>> augment_data([{"text": "A good film", "label": "pos"}], options)
    [{'text': 'A fine film', 'label': 'pos', 'augmented': 1}]
    """
    placed = [row if isinstance(row, Row) else Row(row, line=at) for at, row in enumerate(rows, start=1)]
    augmenter = Augmenter(options)
    return [variant for row in placed for variant in augmenter.variants(row)]


class Augmenter:
    """Makes variants of rows; `augmented` counts them within a row, an `id` gets `-augmented-1`."""

    def __init__(self, options: AugmentOptions) -> None:
        self._options = options
        self._segment = open_segmenter("words")

    def variants(self, row: Row) -> list[Row]:
        found: list[Row] = []
        for number in range(1, self._options.copies + 1):
            variant = row.with_fields(copy.deepcopy(dict(row)))
            random = Random(value_key([self._options.seed, number, row]))
            self._vary(variant, random)
            if variant != row and all(variant != {**other, "augmented": None} for other in found):
                variant["augmented"] = number
                if "id" in row:
                    variant["id"] = f"{row['id']}-augmented-{number}"
                found.append(variant)
        return found

    def _vary(self, row: Row, random: Random) -> None:
        if "tokens" in row:
            self._vary_tokens(row, random)
        elif "answers" in row:
            row["question"] = apply_edits(row["question"], self._edits(row["question"], [], random))
        else:
            spans = [*row.get("entities", ()), *(row[name] for name in ("head", "tail") if name in row)]
            edits = self._edits(row["text"], spans, random)
            row["text"] = apply_edits(row["text"], edits)
            for span in spans:
                span["start"] = move_offset(edits, span["start"], is_end=False)
                span["end"] = move_offset(edits, span["end"], is_end=True)
            if isinstance(row.get("text_pair"), str):
                row["text_pair"] = apply_edits(row["text_pair"], self._edits(row["text_pair"], [], random))

    def _edits(self, text: str, spans: Sequence[Mapping[str, int]], random: Random) -> list[Edit]:
        """Edits of words that no span touches, in order."""
        words = self._segment(text)
        is_free = [
            all(word.end <= span["start"] or word.start >= span["end"] for span in spans) for word in words
        ]
        edits = []
        index = 0
        while index < len(words):
            word = words[index]
            is_pair = index + 1 < len(words) and is_free[index] and is_free[index + 1]
            if is_pair and self._is_swapped(word.text, words[index + 1].text, random):
                following = words[index + 1]
                between = text[word.end : following.start]
                is_beside = all(span["start"] >= following.end or span["end"] <= word.start for span in spans)
                if is_beside:
                    edits.append(Edit(word.start, following.end, following.text + between + word.text))
                    index += 2
                    continue
            if is_free[index] and (new := self._other(word, random)) != word.text:
                edits.append(Edit(word.start, word.end, new))
            index += 1
        return edits

    def _vary_tokens(self, row: Row, random: Random) -> None:
        tokens = row["tokens"]
        is_free = [tag == "O" for tag in row["tags"]] if "tags" in row else [True] * len(tokens)
        for name in ("head", "tail"):
            if name in row:
                for index in range(row[name]["start"], row[name]["end"]):
                    is_free[index] = False
        index = 0
        while index < len(tokens):
            is_pair = index + 1 < len(tokens) and is_free[index] and is_free[index + 1]
            if is_pair and self._is_swapped(tokens[index], tokens[index + 1], random):
                tokens[index], tokens[index + 1] = tokens[index + 1], tokens[index]
                index += 2
                continue
            if is_free[index]:
                new = self._other(Word(tokens[index], 0, 0), random)
                tokens[index] = new if " " not in new else tokens[index]
            index += 1

    def _is_swapped(self, one: str, other: str, random: Random) -> bool:
        is_drawn = random.random() < self._options.swap_ratio
        return is_drawn and one != other and one[0].isalnum() and other[0].isalnum()

    def _other(self, word: Word, random: Random) -> str:
        text = word.text
        known = self._options.synonyms.get(text.casefold())
        if known and random.random() < self._options.synonym_ratio:
            return _in_case_of(text, random.choice(known))
        if len(text) > 3 and text.isalpha() and random.random() < self._options.noise_ratio:
            return _mistype(text, random)
        return text


def _in_case_of(word: str, other: str) -> str:
    """The other word in capitals, or with one, where the word is."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[0].upper() + other[1:] if word[0].isupper() else other


def _mistype(word: str, random: Random) -> str:
    """One typing error after the first letter, of the kinds that Damerau (1964) counted."""
    at = random.randrange(1, len(word) - 1)
    how = random.randrange(4)
    if how == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if how == 1:
        return word[:at] + word[at + 1 :]
    if how == 2:
        return word[:at] + word[at] + word[at:]
    return word[:at] + _neighbour(word[at], random) + word[at + 1 :]


def _neighbour(letter: str, random: Random) -> str:
    for row in _KEYBOARD:
        if (at := row.find(letter.lower())) >= 0:
            near = random.choice(row[max(at - 1, 0) : at] + row[at + 1 : at + 2])
            return near.upper() if letter.isupper() else near
    return letter
