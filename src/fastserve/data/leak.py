"""Whether splits share what they should not: texts that are equal, or almost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import combinations
from typing import Any, NamedTuple

from fastserve.data.digest import text_key, text_of
from fastserve.data.minhash import band_keys, choose_bands, shingles, signature, similarity
from fastserve.data.problem import DROP, ERROR, ProblemLog
from fastserve.data.row import Row, labels_of
from fastserve.option import check_number


class Leak(NamedTuple):
    """Two rows of two splits that say the same, or almost; `similarity` is 1 where their texts are equal."""

    split: str
    row: Row
    other_split: str
    other_row: Row
    similarity: float


def find_leaks(
    splits: Mapping[str, Sequence[Mapping[str, Any]]], *, threshold: float | None = None
) -> list[Leak]:
    """Rows of later splits whose text an earlier split has. With a `threshold`, also those whose similarity
    (Jaccard, of shingles of five characters) is as high, found with a probability of 0.95 or more.

    >>> find_leaks({"train": [{"text": "Hello"}], "test": [{"text": "Hello"}]})[0].similarity
    1.0

    Raises:
        OptionError: the threshold is not within 0 and 1.
    """
    if threshold is not None:
        check_number("threshold", threshold, 0, 1, is_low_open=True)
    placed = {
        name: [row if isinstance(row, Row) else Row(row, line=at) for at, row in enumerate(rows, start=1)]
        for name, rows in splits.items()
    }
    leaks = []
    for one, other in combinations(placed, 2):
        leaks += _equal(one, placed[one], other, placed[other])
        if threshold is not None:
            leaks += _alike(one, placed[one], other, placed[other], threshold)
    return leaks


def check_splits(splits: Mapping[str, Sequence[Row]], log: ProblemLog) -> dict[str, list[Row]]:
    """Splits that were read from files of their own, train first, without what they must not share: problems
    `split-overlap` (the row of the earlier split is dropped) and `unseen-label`, each with file and line.

    >>> splits = {"train": [Row({"text": "a", "label": "x"})], "dev": [Row({"text": "b", "label": "y"})]}
    >>> check_splits(splits, ProblemLog({"unseen-label": "drop"}))["dev"]
    []

    Raises:
        DataError: a problem is fatal, and the log raises at once.
    """
    return drop_unseen_labels(drop_overlaps(splits, log), log)


def drop_overlaps(splits: Mapping[str, Sequence[Row]], log: ProblemLog) -> dict[str, list[Row]]:
    """Splits without the rows whose text a later split has too: problems `split-overlap`. Raises as
    `check_splits`."""
    kept = {name: list(rows) for name, rows in splits.items()}
    names = list(kept)
    for at, name in enumerate(names):
        later = {text_key(row): row.place for other in names[at + 1 :] for row in kept[other]}
        kept[name] = [row for row in kept[name] if not _is_dropped(row, later.get(text_key(row)), log)]
    return kept


def drop_unseen_labels(splits: Mapping[str, Sequence[Row]], log: ProblemLog) -> dict[str, list[Row]]:
    """Splits without the rows that have a label that the first one lacks: problems `unseen-label`. Raises as
    `check_splits`."""
    kept = {name: list(rows) for name, rows in splits.items()}
    first, *others = kept
    known = {str(label) for row in kept[first] for label in labels_of(row)}
    for name in others:
        kept[name] = [row for row in kept[name] if knows_labels(row, known, log)]
    return kept


def knows_labels(row: Row, known: AbstractSet[str], log: ProblemLog) -> bool:
    """Whether a row of dev or test stays: reports a label that training, which has those `known`, lacks. The
    number 1 and the text "1" are one label, as they are in training."""
    for label in labels_of(row):
        if not isinstance(label, float) and str(label) not in known:
            message = f"label {label!r} is not in training"
            return log.report("unseen-label", row.file, row.line, message) not in (ERROR, DROP)
    return True


def _is_dropped(row: Row, other_place: str | None, log: ProblemLog) -> bool:
    if other_place is None:
        return False
    message = f"the text is that of {other_place} too"
    return log.report("split-overlap", row.file, row.line, message) in (ERROR, DROP)


def _equal(one: str, ones: Sequence[Row], other: str, others: Sequence[Row]) -> list[Leak]:
    known = {text_key(row): row for row in reversed(ones)}
    found = ((row, known.get(text_key(row))) for row in others)
    return [Leak(one, match, other, row, 1.0) for row, match in found if match is not None]


def _alike(one: str, ones: Sequence[Row], other: str, others: Sequence[Row], threshold: float) -> list[Leak]:
    num_bands = choose_bands(threshold)
    buckets: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(ones):
        for band, key in enumerate(band_keys(signature(shingles(text_of(row))), num_bands)):
            buckets.setdefault((band, int(key)), []).append(index)
    leaks = []
    for row in others:
        text = text_of(row)
        hashes = shingles(text)
        keys = enumerate(band_keys(signature(hashes), num_bands))
        candidates = sorted({index for band, key in keys for index in buckets.get((band, int(key)), ())})
        for index in candidates:
            if text_of(ones[index]) == text:
                continue  # an equal text is a leak already
            alike = similarity(shingles(text_of(ones[index])), hashes)
            if alike >= threshold:
                leaks.append(Leak(one, ones[index], other, row, alike))
                break
    return leaks
