"""What is checked before anything is compressed: libraries, the source, what steps need, what is limited."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.util import find_spec

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.rounding import row_pieces
from fastserve.compress.budget import NEED_DATA, Budget
from fastserve.compress.model_kind import writes_text
from fastserve.compress.recipe import Recipe
from fastserve.compress.step import Context, Need, WorkingModel
from fastserve.errors import CheckpointError, OptionError, UnsupportedError
from fastserve.tune.dependency import check_tune_libraries

_RESHAPE = ("distil", "structured")
_MINDS_NO_SHAPES = ("recover",)
NEEDED = ("torch", "transformers")


def check_libraries() -> None:
    """Raise UnsupportedError where a library of the extra `[compress]` is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"compression needs {' and '.join(missing)}", hint="pip install 'fastserve-llm[compress]'"
        )
    check_tune_libraries()


_REQUESTS: Mapping[Need, tuple[str, str]] = {
    "calibration": (
        "is calibrated on text",
        "name a file of text, such as the model is to see, with --calibration",
    ),
    "train": ("tunes on rows", "name a file of them with --train, and better one with --dev too"),
    "dev": ("chooses among students by dev rows", "name a file of them with --dev"),
}


def check_needs(recipe: Recipe, files: Collection[str]) -> None:
    """
    Raises:
        OptionError: a step needs a file that is not among those that are given, by what they are for.
    """
    for named in recipe.steps:
        for need, (what, hint) in _REQUESTS.items():
            if need in named.step.needs and need not in files:
                raise OptionError(f"recipe {recipe.name}: {named.name} {what}", hint=hint, option=need)


def check_steps(recipe: Recipe, checkpoint: Checkpoint, context: Context) -> None:
    """Have steps refuse what they can tell of the source: behind the first that changes shapes, those alone
    that mind none. Raises as `Step.check`."""
    is_reshaped = False
    for named in recipe.steps:
        if not is_reshaped or named.name in _MINDS_NO_SHAPES:
            named.step.check(WorkingModel(checkpoint=checkpoint), replace(context, layers=[], notes=[]))
        is_reshaped = is_reshaped or named.name in _RESHAPE


def check_finite(checkpoint: Checkpoint) -> None:
    """
    Raises:
        CheckpointError: a weight is NaN or infinite; the first such tensor is named.
    """
    for name, tensor in checkpoint.tensors.items():
        for begin, end in row_pieces(tensor.shape) if tensor.shape else []:
            values = to_f32(tensor.rows(begin, end))
            if not np.isfinite(values).all():
                count = int((~np.isfinite(values)).sum())
                raise CheckpointError(
                    f"{checkpoint.path}: {name} {list(tensor.shape)} has {count} numbers in rows {begin} to "
                    f"{end - 1} that are NaN or infinite",
                    hint="take the model from its source again",
                )


def check_budget(budget: Budget, checkpoint: Checkpoint, *, has_data: bool) -> None:
    """
    Raises:
        OptionError: something is limited that will not be measured.
    """
    if not has_data and (unknown := sorted(budget.names & NEED_DATA)):
        raise OptionError(
            f"budget: {unknown[0]} is measured on text or labelled rows",
            hint="give such a file with --data",
            option="data",
        )
    is_decoder = writes_text(checkpoint)
    of_others: Mapping[str, str] = {"latency": "decode"} if is_decoder else {"decode": "latency"}
    if not is_decoder:
        of_others = {"decode": "latency", "prefill": "latency"}
    for name, instead in of_others.items():
        if name in budget.names:
            kind = "a model that writes, which has no" if is_decoder else "one that reads, which has no"
            raise OptionError(
                f"budget: {checkpoint.path} is {kind} {name}", hint=f"limit {instead}", option="budget"
            )
