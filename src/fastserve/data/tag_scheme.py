"""Schemes in which tags tell the entities of a sentence: IO, IOB1, IOB2, IOBES, BMES. Reading, writing,
telling which one a file is in, and converting.

A tag is `O`, or a prefix, a dash and a label: `B-LOC`. IOB1 is of Ramshaw and Marcus (1995), IOB2 of
Ratnaparkhi (1998); https://en.wikipedia.org/wiki/Inside-outside-beginning_(tagging) compares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fastserve.errors import DataError
from fastserve.option import check_choice

SCHEMES = ("io", "iob1", "iob2", "iobes", "bmes")
OUTSIDE = "O"

_PREFIXES = {"io": "I", "iob1": "BI", "iob2": "BI", "iobes": "BIES", "bmes": "BMES"}
_PREFERRED = ("iob2", "iob1", "io", "iobes", "bmes")  # where tags fit several, which then mean the same


class Span(NamedTuple):
    """An entity: tokens `start` to `end`, which is exclusive, and its label."""

    start: int
    end: int
    label: str


def find_violation(tags: Sequence[str], scheme: str) -> str | None:
    """What in a sentence the scheme does not have; None where nothing.

    >>> find_violation(["O", "I-LOC"], "iob2")
    "tag 1 'I-LOC' goes on after 'O', where no 'LOC' is"
    >>> find_violation(["O", "I-LOC"], "iob1") is None
    True
    """
    before, label_before = OUTSIDE, ""
    for index, tag in enumerate([*tags, OUTSIDE]):
        prefix, label = _split(tag)
        if prefix not in _PREFIXES[scheme] + OUTSIDE or (prefix != OUTSIDE and not label):
            return f"tag {index} {tag!r} is none of {scheme}: {', '.join(_PREFIXES[scheme])} or O"
        goes_on = prefix in "IME" and scheme not in ("io", "iob1")
        can_go_on = before in "BIM" and before != OUTSIDE and label == label_before
        if goes_on and not can_go_on:
            previous = repr(tags[index - 1]) if index else "nothing"
            return f"tag {index} {tag!r} goes on after {previous}, where no {label!r} is"
        if scheme in ("iobes", "bmes") and before in "BIM" and before != OUTSIDE and not goes_on:
            return f"tag {index - 1} {tags[index - 1]!r} has no end"
        if scheme == "iob1" and prefix == "B" and label != label_before:
            return (
                f"tag {index} {tag!r} begins an entity where none of {label!r} is before: that is I-{label}"
            )
        before, label_before = prefix, label
    return None


def read_spans(tags: Sequence[str]) -> list[Span]:
    """The entities of a sentence, as evaluation scripts read them whatever the scheme: one begins with B or
    S, where the label changes, and where none goes on; it ends with E or S, and where none goes on.

    >>> read_spans(["B-PER", "I-PER", "O", "S-LOC"])
    [Span(start=0, end=2, label='PER'), Span(start=3, end=4, label='LOC')]
    """
    spans: list[Span] = []
    is_open = False
    for index, tag in enumerate(tags):
        prefix, label = _split(tag)
        if prefix == OUTSIDE:
            is_open = False
        elif is_open and prefix in "IME" and label == spans[-1].label:
            spans[-1] = spans[-1]._replace(end=index + 1)
            is_open = prefix != "E"
        else:
            spans.append(Span(index, index + 1, label))
            is_open = prefix not in "ES"
    return spans


def write_tags(spans: Iterable[Span], num_tokens: int, scheme: str) -> list[str]:
    """Tags of `num_tokens` tokens for entities that do not overlap. IO cannot part neighbours of one label.

    >>> write_tags([Span(0, 2, "PER"), Span(2, 3, "PER")], 4, "iob1")
    ['I-PER', 'I-PER', 'B-PER', 'O']

    Raises:
        OptionError: no scheme has that name.
    """
    check_choice("tag_scheme", scheme, SCHEMES)
    tags = [OUTSIDE] * num_tokens
    middle = "M" if scheme == "bmes" else "I"
    last = Span(-1, -1, "")
    for span in sorted(spans):
        for index in range(span.start, span.end):
            tags[index] = f"{middle}-{span.label}"
        if scheme in ("iobes", "bmes"):
            tags[span.end - 1] = f"E-{span.label}"
            tags[span.start] = f"{'S' if span.end - span.start == 1 else 'B'}-{span.label}"
        elif scheme == "iob2" or (scheme == "iob1" and (last.end, last.label) == (span.start, span.label)):
            tags[span.start] = f"B-{span.label}"
        last = span
    return tags


def convert_tags(tags: Sequence[str], source: str, target: str) -> list[str]:
    """Tags of one scheme in another.

    >>> convert_tags(["I-PER", "I-PER", "O"], "iob1", "iobes")
    ['B-PER', 'E-PER', 'O']

    Raises:
        OptionError: no scheme has that name.
        DataError: the tags are not of the source scheme, or IO would join neighbours that are two.
    """
    check_choice("source", source, SCHEMES)
    if violation := find_violation(tags, source):
        raise DataError(violation, hint="name the scheme that the tags are in")
    spans = read_spans(tags)
    if target == "io" and (joined := find_neighbours(spans)):
        raise DataError(
            f"io would join two entities {joined.label!r} at token {joined.start}",
            hint="choose a scheme that parts them, such as iob2",
        )
    return write_tags(spans, len(tags), target)


def find_neighbours(spans: Sequence[Span]) -> Span | None:
    """The first entity that begins where another of its label ends; None where there is none."""
    for one, other in pairwise(spans):
        if (one.end, one.label) == (other.start, other.label):
            return other
    return None


def fitting_schemes(tags: Sequence[str]) -> frozenset[str]:
    """The schemes that have such a sentence.

    >>> sorted(fitting_schemes(["O", "I-LOC", "O"]))
    ['io', 'iob1']
    """
    return frozenset(scheme for scheme in SCHEMES if find_violation(tags, scheme) is None)


@dataclass(slots=True)
class SchemeEvidence:
    """Which schemes the sentences of a file fit, gathered one by one."""

    fits: Counter[str]
    num_sentences: int = 0

    @classmethod
    def empty(cls) -> SchemeEvidence:
        return cls(Counter())

    def add(self, schemes: frozenset[str]) -> None:
        self.fits.update(schemes)
        self.num_sentences += 1

    @property
    def best(self) -> str:
        """The scheme that most sentences fit; of those that fit as many, the one used most."""
        return max(_PREFERRED, key=lambda scheme: (self.fits[scheme], -_PREFERRED.index(scheme)))


def detect_scheme(sentences: Iterable[Sequence[str]]) -> str:
    """The scheme that all sentences are in; of several, the one used most: they then mean the same.

    >>> detect_scheme([["B-PER", "I-PER"], ["O", "B-LOC"]])
    'iob2'

    Raises:
        DataError: no scheme has them all.
    """
    evidence = SchemeEvidence.empty()
    for tags in sentences:
        evidence.add(fitting_schemes(tags))
    best = evidence.best
    if missing := evidence.num_sentences - evidence.fits[best]:
        raise DataError(
            f"the tags are of no one scheme: {best} fits most sentences, but not {missing}",
            hint="convert them, or name the scheme and what is to be done about the others",
        )
    return best


def _split(tag: str) -> tuple[str, str]:
    """Prefix and label. What is no tag has a prefix that no scheme has."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    if tag[1:2] == "-":
        return tag[0], tag[2:]
    return tag or "?", ""
