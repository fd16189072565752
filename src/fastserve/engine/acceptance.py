"""How often guessed tokens come true, learned from those that came."""

from __future__ import annotations

_NUM_CLASSES = 8  # of match lengths: 1, 2-3, 4-7, ..., 128 and more
_PRIOR_GUESSES = 3.0  # how many guesses the prior counts for


class Acceptance:
    """The share of right guesses, by how many tokens before them agreed with the place they were read off.

    Wrong and right guesses count the same whether they were verified together or came one by one, so that a
    text is known to be worth speculating on before any row is spent on it.

    >>> acceptance = Acceptance(memory=100)
    >>> acceptance.rate(4)
    0.0
    >>> for _ in range(100):
    ...     acceptance.observe(4, True)
    >>> acceptance.rate(4) > 0.9
    True

    Args:
        memory: of a class, how many of the last guesses count.
        prior: what is expected where little is known; None: nothing comes true.
    """

    def __init__(self, *, memory: float, prior: Acceptance | None = None) -> None:
        self._forgetting = 1 - 1 / memory
        self._prior = prior
        self._right = [0.0] * (_NUM_CLASSES + 1)
        self._all = [0.0] * (_NUM_CLASSES + 1)

    def observe(self, match_length: int, is_right: bool) -> None:
        index = _class_of(match_length)
        self._right[index] = self._forgetting * self._right[index] + is_right
        self._all[index] = self._forgetting * self._all[index] + 1

    def rate(self, match_length: int) -> float:
        """The probability that the next guess is right."""
        return self._rate(_class_of(match_length))

    def _rate(self, index: int) -> float:
        """Where little is known of a class, that of the prior, or else that of the class of shorter
        matches."""
        if self._prior is not None:
            before = self._prior._rate(index)
        else:
            before = self._rate(index - 1) if index > 0 else 0.0
        return (self._right[index] + _PRIOR_GUESSES * before) / (self._all[index] + _PRIOR_GUESSES)


def _class_of(match_length: int) -> int:
    return min(match_length.bit_length(), _NUM_CLASSES)
