"""Entities in a sequence of tags: what a tagger is scored on."""

from __future__ import annotations

from collections.abc import Sequence as Seq

Span = tuple[int, int, str]
"""First token, the one behind the last, and the label of an entity."""


def entities_of_tags(tags: Seq[str]) -> list[Span]:
    """The entities that tags spell, in any of IO, IOB1, IOB2, IOBES (E or L, S or U) and BMES.

    A sequence that its scheme does not have is read as conlleval and seqeval do in their default mode: an
    entity begins where none of its label goes on.

    >>> entities_of_tags(["B-PER", "I-PER", "O", "I-LOC", "S-ORG"])
    [(0, 2, 'PER'), (3, 4, 'LOC'), (4, 5, 'ORG')]
    """
    found: list[Span] = []
    start, label = 0, ""
    before = "O"
    for index, tag in enumerate([*tags, "O"]):
        prefix, name = split_tag(tag)
        ends_before = before in ("E", "S")
        begins = prefix in ("B", "S") or name != label or ends_before
        if label and (prefix == "O" or begins):
            found.append((start, index, label))
            label = ""
        if prefix != "O" and (begins or not label):
            start, label = index, name
        before = prefix
    return found


def split_tag(tag: str) -> tuple[str, str]:
    """The prefix of a tag, one of B I E S O, and its label; a tag that is a label alone (IO) is inside of it.

    >>> split_tag("M-LOC"), split_tag("LOC"), split_tag("O")
    (('I', 'LOC'), ('I', 'LOC'), ('O', ''))
    """
    if tag in ("O", ""):
        return "O", ""
    prefix, dash, name = tag.partition("-")
    if not dash or prefix not in _PREFIXES:
        return "I", tag
    return _PREFIXES[prefix], name


_PREFIXES = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}
