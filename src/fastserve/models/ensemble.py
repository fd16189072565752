"""What fastserve.json says of an ensemble: its members, and how their probabilities become one."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastserve.errors import CheckpointError
from fastserve.types import JsonObject

EnsembleMethod = Literal["vote", "average", "stacking"]

ENSEMBLE_TASKS = ("text-classification", "pair-classification", "relation-extraction", "token-classification")
"""The tasks whose predictions are probabilities of labels, whatever the tokenizer: those can be mixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleSettings:
    """
    Attributes:
        members: their folders, within that of the ensemble.
        weights: of vote and average, one a member, positive; empty with stacking.
        coefficients: of stacking, [labels][members x labels]: of the probabilities of all members, one after
            the other, labels in the order of the ensemble.
        intercepts: of stacking, [labels].
    """

    method: EnsembleMethod
    members: tuple[str, ...]
    weights: tuple[float, ...] = ()
    coefficients: tuple[tuple[float, ...], ...] = ()
    intercepts: tuple[float, ...] = ()

    def to_json(self) -> JsonObject:
        """As fastserve.json has it under `ensemble`."""
        document = {"method": self.method, "members": list(self.members)}
        if self.method != "stacking":
            return {**document, "weights": list(self.weights)}
        coefficients = [list(row) for row in self.coefficients]
        return {**document, "coefficients": coefficients, "intercepts": list(self.intercepts)}


def read_ensemble(card: JsonObject, *, num_labels: int) -> EnsembleSettings | None:
    """The ensemble that a fastserve.json describes; None where it is that of a single model.

    Raises:
        CheckpointError: a value is impossible.
    """
    found = card.get("ensemble")
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("method") not in get_args(EnsembleMethod):
        raise CheckpointError(
            "fastserve.json has an ensemble without a method that we know",
            hint=f"methods are {', '.join(get_args(EnsembleMethod))}",
        )
    members = found.get("members")
    if not isinstance(members, list) or len(members) < 2 or not all(map(_is_folder_name, members)):
        raise CheckpointError(
            f"fastserve.json has an ensemble of members={members!r:.80}; "
            "two or more folders within its own are expected"
        )
    if found["method"] != "stacking":
        weights = _numbers(found, "weights", [found.get("weights")], 1, len(members))[0]
        if min(weights) < 0 or not sum(weights):
            raise CheckpointError(f"fastserve.json has weights={list(weights)}; none may be negative")
        return EnsembleSettings(method=found["method"], members=tuple(members), weights=weights)
    return EnsembleSettings(
        method="stacking",
        members=tuple(members),
        coefficients=_numbers(
            found, "coefficients", found.get("coefficients"), num_labels, len(members) * num_labels
        ),
        intercepts=_numbers(found, "intercepts", [found.get("intercepts")], 1, num_labels)[0],
    )


def _is_folder_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _numbers(
    found: JsonObject, name: str, rows: Any, num_rows: int, num_columns: int
) -> tuple[tuple[float, ...], ...]:
    """Rows of finite numbers, [num_rows][num_columns]."""
    is_right = isinstance(rows, list) and len(rows) == num_rows and all(_is_row(r, num_columns) for r in rows)
    if not is_right:
        raise CheckpointError(
            f"fastserve.json has {name}={found.get(name)!r:.80} of an ensemble; "
            f"{num_rows} x {num_columns} numbers are expected",
            hint="make the ensemble again",
        )
    return tuple(tuple(float(value) for value in row) for row in rows)


def _is_row(row: Any, num_columns: int) -> bool:
    if not isinstance(row, Seq) or isinstance(row, str) or len(row) != num_columns:
        return False
    return all(type(value) in (int, float) and math.isfinite(value) for value in row)
