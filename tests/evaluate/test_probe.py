"""Probes find a classifier that treats groups differently, and one that does not see a negation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastserve.errors import DataError
from fastserve.evaluate.probe import probe, read_probes

PROBES = {
    "swaps": [
        {
            "name": "gender",
            "templates": ["{} is late.", "{} left."],
            "groups": {"women": ["Mary"], "men": ["John"]},
        }
    ],
    "negations": [["It is good.", "It is not good."], ["I like it.", "I do not like it."]],
}


def of_word(word: str, *, with_it: float, without: float) -> Any:
    """A classifier that looks at one word."""

    def predict(texts: Sequence[str]) -> list[dict[str, Any]]:
        shares = [with_it if word in text else without for text in texts]
        return [{"probabilities": {"bad": share, "good": 1 - share}} for share in shares]

    return predict


def test_a_classifier_that_looks_at_names_has_a_gap_between_groups() -> None:
    [swap] = probe(of_word("John", with_it=0.9, without=0.3), PROBES).swaps
    assert swap.gap == pytest.approx(0.6)
    assert swap.probabilities["men"]["bad"] == pytest.approx(0.9)
    assert swap.share_changed == 1.0
    label_has_more = {"bad": ("men", "women"), "good": ("women", "men")}
    assert swap.groups == label_has_more[swap.label]


def test_a_classifier_that_looks_at_no_names_has_none() -> None:
    [swap] = probe(of_word("late", with_it=0.9, without=0.3), PROBES).swaps
    assert swap.gap == 0
    assert swap.share_changed == 0


def test_a_negation_that_is_seen_changes_the_label() -> None:
    seen = probe(of_word("not", with_it=0.9, without=0.1), PROBES).negation
    unseen = probe(of_word("John", with_it=0.9, without=0.1), PROBES).negation
    assert seen is not None
    assert unseen is not None
    assert (seen.share_changed, seen.mean_shift) == (1.0, pytest.approx(0.8))
    assert (unseen.share_changed, unseen.mean_shift) == (0.0, 0.0)


def test_the_probes_that_come_along_are_well_formed() -> None:
    assert {swap["name"] for swap in read_probes(None)["swaps"]} >= {"gender", "origin"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is no JSON"),
        ("{}", "has no swaps"),
        ('{"swaps": [{"name": "x", "templates": ["a"], "groups": {"a": ["b"], "c": ["d"]}}]}', "has no {}"),
        ('{"swaps": [{"templates": ["{}"], "groups": {"a": ["b"], "c": ["d"]}}]}', "lacks its name"),
        ('{"swaps": [{"name": "x", "templates": "{}", "groups": {"a": ["b"], "c": ["d"]}}]}', "templates"),
        ('{"swaps": [{"name": "x", "templates": ["{}"], "groups": ["a", "b"]}]}', "two groups"),
        ('{"swaps": [{"name": "x", "templates": ["{}"], "groups": {"a": [], "b": ["c"]}}]}', "two groups"),
        ('{"swaps": 3}', "swaps is no list"),
        ('{"negations": [["It is good."]]}', "is no pair of texts"),
        ('{"negations": ["ab"]}', "is no pair of texts"),
    ],
)
def test_a_broken_file_of_probes_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "probes.json"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=message):
        read_probes(path)
