"""Prompts of given lengths in tokens for servers whose tokenizer is not at hand: real text, if there is some.

How many tokens a word takes is asked of the server, by its own count of two prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastserve.evaluate.arrival import PREFIX_TOKENS, Arrival

TEXT = "lm_inaugural/inaugural.txt"  # within the folder of data
SHORT_WORDS, LONG_WORDS = 20, 420  # of the two prompts that are counted

# Without data, text is drawn from these; common words, most of which are a token each.
_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said
what its about than into them can only other time new some could these two may first then do any like my
"""


@dataclass(frozen=True, slots=True)
class TokenRate:
    """Tokens of a prompt of n words: `overhead + per_word * n`."""

    per_word: float = 1.3  # of English, of most vocabularies
    overhead: float = 0.0  # of the chat template, and of a token that begins every prompt

    @classmethod
    def from_counts(cls, short_tokens: int, long_tokens: int) -> TokenRate:
        """From the tokens of prompts of SHORT_WORDS and LONG_WORDS.

        >>> TokenRate.from_counts(30, 530)
        TokenRate(per_word=1.25, overhead=5.0)
        """
        per_word = max((long_tokens - short_tokens) / (LONG_WORDS - SHORT_WORDS), 0.1)
        return cls(per_word, max(short_tokens - per_word * SHORT_WORDS, 0.0))

    def words_of(self, num_tokens: int) -> int:
        return max(round((num_tokens - self.overhead) / self.per_word), 1)

    def tokens_of(self, num_words: int) -> int:
        return max(round(self.overhead + self.per_word * num_words), 1)


class PromptText:
    """Text to cut prompts from.

    Args:
        data: the folder of data; without it, or without its text, words are drawn.
    """

    def __init__(self, data: Path | None) -> None:
        path = data / TEXT if data is not None else None
        self.source = TEXT if path is not None and path.is_file() else "words drawn at random"
        self._words = _read_words(path if self.source == TEXT else None)

    def of_words(self, num_words: int, seed: tuple[int, ...]) -> str:
        """So many words from a place that the seed picks; the same for the same seed."""
        start = int(np.random.default_rng(seed).integers(len(self._words)))
        repeats = -(-(start + num_words) // len(self._words))
        return " ".join((self._words * repeats)[start : start + num_words])

    def of_arrival(self, arrival: Arrival, rate: TokenRate, seed: tuple[int, ...]) -> str:
        """A prompt of the arrival's length. It begins as those with the same prefix ids do, and else as no
        other.
        """
        num_words = rate.words_of(arrival.prompt_tokens)
        per_prefix = max(round(PREFIX_TOKENS / rate.per_word), 1)
        pieces = []
        for prefix_id in arrival.prefix_ids:
            taken = min(per_prefix, num_words)
            pieces.append(self.of_words(taken, (prefix_id, 11)))
            num_words -= taken
        if num_words > 0:
            pieces.append(self.of_words(num_words, (*seed, 12)))
        return " ".join(piece for piece in pieces if piece)


@lru_cache(maxsize=2)
def _read_words(path: Path | None) -> list[str]:
    if path is not None:
        return path.read_text(encoding="utf-8", errors="replace").split()
    rng = np.random.default_rng(0)
    words = _WORDS.split()
    return [words[index] for index in rng.integers(len(words), size=50_000)]
