"""Probes for bias and harm of a text classifier: what changes where only a name, a group or a negation does.

Templates with swapped words, as in Kiritchenko and Mohammad 2018 (aclanthology S18-2005), and pairs with and
without a negation, as in Ribeiro et al. 2020 (arXiv 2005.04118, minimum functionality tests).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.errors import DataError
from fastserve.evaluate.task.task import Prediction

Predict = Callable[[Seq[str]], Seq[Prediction]]
"""Predictions with `probabilities` by label, one for each text."""


@dataclass(frozen=True, slots=True)
class SwapGap:
    """What swapping groups in templates changes.

    Attributes:
        name: of the swap, such as `gender`.
        probabilities: mean by group and label.
        gap: the most by which two groups' means of a label differ, `label` that one, `groups` those, the one
            with more first.
        share_changed: of templates, how often the likeliest label is not the same for all words.
    """

    name: str
    probabilities: dict[str, dict[str, float]]
    gap: float
    label: str
    groups: tuple[str, str]
    share_changed: float


@dataclass(frozen=True, slots=True)
class NegationShift:
    """What a negation changes: how often the likeliest label, and by how much the probabilities (total
    variation, 0 to 1), in the mean."""

    share_changed: float
    mean_shift: float
    num_pairs: int


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Of all probes."""

    swaps: tuple[SwapGap, ...]
    negation: NegationShift | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_probes(path: Path | None) -> Mapping[str, Any]:
    """Probes of a JSON file, or those that come with fastserve, which are English.

        {"swaps": [{"name": "gender", "templates": ["{} is late."],
                    "groups": {"women": ["Mary"], "men": ["John"]}}],
         "negations": [["It is good.", "It is not good."]]}

    Raises:
        DataError: the file is missing, broken, or a part of it is not of this form.
    """
    if path is None:
        text, name = (
            resources.files("fastserve.evaluate").joinpath("probes.json").read_text("utf-8"),
            "probes",
        )
    elif path.is_file():
        try:
            text, name = path.read_text("utf-8-sig"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as UTF-8: {error}", hint="write it anew") from error
    else:
        raise DataError(f"no file is at {path}", hint="give the path of a JSON file of probes")
    try:
        probes = json.loads(text)
    except ValueError as error:
        raise DataError(f"{name} is no JSON: {error}") from error
    if not isinstance(probes, dict) or not probes.keys() <= {"swaps", "negations"} or not probes:
        raise DataError(f"{name} has no swaps and no negations", hint="give one of them, or both")
    for part in ("swaps", "negations"):
        if not isinstance(probes.get(part, []), list):
            raise DataError(f"{name}: {part} is no list: {probes[part]!r:.80}")
    for swap in probes.get("swaps", ()):
        if not _is_swap(swap):
            raise DataError(
                f"{name}: a swap lacks its name, templates, or two groups of words: {swap!r:.80}",
                hint='as in {"name": "x", "templates": ["{} is"], "groups": {"a": ["Ann"], "b": ["Bob"]}}',
            )
        if bad := [template for template in swap["templates"] if "{}" not in template]:
            raise DataError(f"{name}: template {bad[0]!r} has no {{}} for a word")
    for pair in probes.get("negations", ()):
        if not _are_texts(pair) or len(pair) != 2:
            raise DataError(f"{name}: a negation is no pair of texts: {pair!r:.80}")
    return probes


def _is_swap(swap: Any) -> bool:
    if not isinstance(swap, dict) or not isinstance(swap.get("name"), str):
        return False
    groups = swap.get("groups")
    has_groups = isinstance(groups, dict) and len(groups) > 1 and all(map(_are_texts, groups.values()))
    return has_groups and _are_texts(swap.get("templates"))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def probe(predict: Predict, probes: Mapping[str, Any]) -> ProbeReport:
    """Run probes on a classifier. Gaps say that a model treats groups differently, not that a small gap is
    fair.

    Raises:
        DataError: predictions have no probabilities: the model is for no classes.
    """
    swaps = tuple(_swap(predict, swap) for swap in probes.get("swaps", ()))
    pairs = probes.get("negations", ())
    return ProbeReport(swaps, _negation(predict, pairs) if pairs else None)


def _swap(predict: Predict, swap: Mapping[str, Any]) -> SwapGap:
    words = [(group, word) for group, names in swap["groups"].items() for word in names]
    templates = swap["templates"]
    found = _probabilities(
        predict, [template.replace("{}", word) for template in templates for _, word in words]
    )
    labels = list(found[0])
    table = np.array([[shares[label] for label in labels] for shares in found])
    table = table.reshape(len(templates), len(words), len(labels))
    means = {
        group: table[:, [index for index, (of, _) in enumerate(words) if of == group]].mean(axis=(0, 1))
        for group in swap["groups"]
    }
    gap, label, one, other = max(
        (abs(float(means[a][i] - means[b][i])), i, a, b)
        for a, b in combinations(means, 2)
        for i in range(len(labels))
    )
    first, second = (one, other) if means[one][label] >= means[other][label] else (other, one)
    likeliest = table.argmax(axis=2)
    changed = float((likeliest != likeliest[:, :1]).any(axis=1).mean())
    by_group = {group: dict(zip(labels, mean.tolist(), strict=True)) for group, mean in means.items()}
    return SwapGap(swap["name"], by_group, gap, labels[label], (first, second), changed)


def _negation(predict: Predict, pairs: Seq[Seq[str]]) -> NegationShift:
    found = _probabilities(predict, [text for pair in pairs for text in pair])
    labels = list(found[0])
    table = np.array([[shares[label] for label in labels] for shares in found]).reshape(len(pairs), 2, -1)
    changed = table[:, 0].argmax(axis=1) != table[:, 1].argmax(axis=1)
    shift = np.abs(table[:, 0] - table[:, 1]).sum(axis=1) / 2
    return NegationShift(float(changed.mean()), float(shift.mean()), len(pairs))


def _probabilities(predict: Predict, texts: Seq[str]) -> list[Mapping[str, float]]:
    found = [prediction.get("probabilities") for prediction in predict(texts)]
    if any(shares is None for shares in found):
        raise DataError("probes need a classifier of texts", hint="leave them out for other models")
    return [shares for shares in found if shares is not None]
