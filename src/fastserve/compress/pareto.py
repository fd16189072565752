"""What is best at two things at once: choices of which none is smaller and better at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_MOST_CHOICES = 4000  # that are kept while groups are added


@dataclass(frozen=True, slots=True)
class Choice:
    """An option of each group, by its index, and what it comes to: sums over groups."""

    options: tuple[int, ...]
    size: float
    loss: float


def front_of_sums(groups: Sequence[Sequence[tuple[float, float]]]) -> list[Choice]:
    """Of groups whose options have (size, loss), the choices of an option each that no other one beats in the
    sums, by rising size.

    >>> [choice.options for choice in front_of_sums([[(4, 0.0), (1, 0.3)], [(4, 0.0), (1, 0.1)]])]
    [(1, 1), (0, 1), (0, 0)]
    """
    choices = [Choice((), 0.0, 0.0)]
    for options in groups:
        longer = [
            Choice((*choice.options, index), choice.size + size, choice.loss + loss)
            for choice in choices
            for index, (size, loss) in enumerate(options)
        ]
        choices = front(longer, [(choice.size, choice.loss) for choice in longer])
        if len(choices) > _MOST_CHOICES:
            step = (len(choices) - 1) / (_MOST_CHOICES - 1)
            choices = [choices[round(index * step)] for index in range(_MOST_CHOICES)]
    return choices


def front(items: Sequence[T], values: Sequence[tuple[float, float]]) -> list[T]:
    """Of items with two values each, of which less is better, those that none beats, by the first value.

    >>> front("abc", [(1, 3), (2, 3), (3, 1)])
    ['a', 'c']
    """
    kept: list[T] = []
    least = float("inf")
    for index in sorted(range(len(items)), key=lambda index: values[index]):
        if values[index][1] < least:
            least = values[index][1]
            kept.append(items[index])
    return kept
