"""Bounds what the rules of a tokenizer.json can make of a text: files of strangers are read too."""

from __future__ import annotations

import base64
from math import prod
from pathlib import Path

from tokenizers import Tokenizer

from fastserve.checkpoint.charsmap import check_charsmap
from fastserve.checkpoint.tokenizer_library import steps_of
from fastserve.errors import CheckpointError
from fastserve.types import JsonObject

MAX_GROWTH = 256  # so many times longer may rules make a text; published ones stay below 8
MAX_ENDS = 64  # special tokens around a text; published ones have at most 4


def check_rules(tokenizer: Tokenizer, path: Path) -> None:
    """
    Raises:
        CheckpointError: rules that multiply a text, surround it with more than a few tokens, put it there
            several times, or lead out of their own tables.
    """
    for what, part in (("normalizer", tokenizer.normalizer), ("decoder", tokenizer.decoder)):
        steps = list(steps_of(part))
        for step in steps:
            if step["type"] == "Precompiled":
                _check_precompiled(step, path)
        growth = prod(_growth(step) for step in steps)
        if growth > MAX_GROWTH:
            raise CheckpointError(
                f"{path} has a {what} that makes texts {growth} times longer, the limit is {MAX_GROWTH}",
                hint="do not trust its source",
            )
    for step in steps_of(tokenizer.post_processor):
        if step["type"] == "TemplateProcessing":
            _check_template(step, path)


def _check_precompiled(step: JsonObject, path: Path) -> None:
    try:
        check_charsmap(base64.b64decode(step["precompiled_charsmap"]))
    except ValueError as error:
        raise CheckpointError(
            f"{path} holds no valid tokenizer: {error}", hint="download the model again"
        ) from error


def _growth(step: JsonObject) -> int:
    if step["type"] == "Replace":
        return max(1, len(step["content"]))
    return max(1, len(step["prepend"])) if step["type"] == "Prepend" else 1


def _check_template(step: JsonObject, path: Path) -> None:
    num_ids = sum(len(token["ids"]) for token in step["special_tokens"].values())
    for name in ("single", "pair"):
        sequences = [piece["Sequence"]["id"] for piece in step[name] if "Sequence" in piece]
        if len(step[name]) > MAX_ENDS or num_ids > MAX_ENDS or len(set(sequences)) != len(sequences):
            raise CheckpointError(
                f"{path} surrounds a text by {len(step[name])} parts, {len(sequences)} of them the text"
                f" itself, and {num_ids} tokens: the limit is {MAX_ENDS} and a text once",
                hint="do not trust its source",
            )
