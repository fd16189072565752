"""Exact match and F1 of answers, as SQuAD's script has them (Rajpurkar et al. 2016, arXiv 1606.05250, section
6.1), and, for text without spaces between words, by character as CMRC 2018's."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence as Seq

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def answer_tokens(text: str) -> list[str]:
    """The words of an answer in lower case, without articles and punctuation; each Han character, kana or
    Thai letter is a word.

    >>> answer_tokens("The 3 Gorges, 三峡")
    ['3', 'gorges', '三', '峡']
    """
    kept = "".join(" " if _is_punctuation(char) and ord(char) > 127 else char for char in text.lower())
    kept = "".join(char for char in kept if char not in _PUNCTUATION)
    kept = _ARTICLES.sub(" ", kept)
    return "".join(f" {char} " if is_word_alone(char) else char for char in kept).split()


def exact_match(said: str, answers: Seq[str]) -> float:
    """1.0 where the prediction is one of the answers, compared by `answer_tokens`; without answers, where it
    is empty."""
    return max(float(answer_tokens(said) == answer_tokens(answer)) for answer in answers or [""])


def answer_f1(said: str, answers: Seq[str]) -> float:
    """The F1 of words shared with the best of the answers; of an empty one, 1.0 where both are empty."""
    return max(_f1(answer_tokens(said), answer_tokens(answer)) for answer in answers or [""])


def is_word_alone(char: str) -> bool:
    """Whether a character is of a script that writes no spaces between words, such as Han."""
    code = ord(char)
    return any(low <= code <= high for low, high in _UNSPACED)


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    num_shared = sum((Counter(said) & Counter(right)).values())
    return 2 * num_shared / (len(said) + len(right))


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char).startswith("P")


# Blocks of the Unicode standard: Thai and Lao, kana, Han with extensions and compatibility forms.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
