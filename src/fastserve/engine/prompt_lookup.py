"""Prompt lookup: what a sequence may say next, read off an earlier place of its own text.

Where the last tokens of a text have occurred before, those that followed there are the guess (Saxena, "Prompt
lookup decoding", 2023, github.com/apoorvumang/prompt-lookup-decoding): texts that are edited, summarized or
quoted are copied in long runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

_MOST_PLACES = 16  # the latest ones of an n-gram that are compared


class PromptLookup:
    """Follows one text and guesses how it goes on.

    A place, once found, is kept as long as it agrees: the longer that is, the likelier it agrees further.

    >>> lookup = PromptLookup(least_ngram=2, most_ngram=4)
    >>> lookup.read([1, 2, 3, 4, 9, 1, 2])
    []
    >>> lookup.match_length, lookup.guess(3)
    (2, [3, 4, 9])
    >>> lookup.read([1, 2, 3, 4, 9, 1, 2, 3, 5])
    [(2, True), (3, False)]

    Args:
        least_ngram: tokens that must have occurred before, in this order.
        most_ngram: the place that agrees with the most tokens is taken, the latest of several; beyond so
            many they count as equal.
    """

    def __init__(self, *, least_ngram: int, most_ngram: int) -> None:
        self._least = least_ngram
        self._most = most_ngram
        self._token_ids: Seq[int] = ()
        self._num_read = 0
        self._source: int | None = None  # position of the token that is guessed next
        self.match_length = 0  # tokens before that position that agree with the last ones of the text
        # Chains, as compressors have them: the latest position after an n-gram, and the one before that.
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier = array("i", [0] * least_ngram)  # by position; 0, before which nothing is, ends a chain

    @property
    def has_guess(self) -> bool:
        return self._source is not None

    def read(self, token_ids: Seq[int]) -> list[tuple[int, bool]]:
        """Take note of what has been added to the text. Returns, for each new token that was guessed, the
        match length before it and whether the guess was right.

        Args:
            token_ids: all of the text; it is kept, not copied.
        """
        observed: list[tuple[int, bool]] = []
        self._token_ids = token_ids
        for position in range(self._num_read, len(token_ids)):
            if self._source is None:
                break
            is_right = token_ids[self._source] == token_ids[position]
            observed.append((self.match_length, is_right))
            self._source = self._source + 1 if is_right else None
            self.match_length += is_right
        self._index()
        self._num_read = len(token_ids)
        if self._source is None:
            self._find()
        return observed

    def guess(self, num_tokens: int) -> list[int]:
        """The tokens that may follow. A text that has come upon its own end goes on from what is guessed."""
        assert self._source is not None
        guessed = list(self._token_ids[self._source : self._source + num_tokens])
        period = len(self._token_ids) - self._source
        while len(guessed) < num_tokens:
            guessed.append(guessed[len(guessed) - period])
        return guessed

    def _index(self) -> None:
        """Every n-gram that something follows."""
        size, ids, latest = self._least, self._token_ids, self._latest
        for position in range(len(self._earlier), len(ids)):
            ngram = tuple(ids[position - size : position])
            self._earlier.append(latest.get(ngram, 0))
            latest[ngram] = position

    def _find(self) -> None:
        ids = self._token_ids
        self.match_length = 0
        if len(ids) < self._least:
            return
        position = self._latest.get(tuple(ids[-self._least :]), 0)
        for _ in range(_MOST_PLACES):
            if position == 0 or self.match_length == self._most:
                return
            length = self._least
            while length < min(self._most, position) and ids[position - 1 - length] == ids[-1 - length]:
                length += 1
            if length > self.match_length:
                self._source, self.match_length = position, length
            position = self._earlier[position]
