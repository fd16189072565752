"""Checks that a tokenizer and a model are of each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.errors import CheckpointError
from fastserve.types import JsonObject

if TYPE_CHECKING:
    import tokenizers

# Models have more rows than tokens where the number was rounded up, to at most some 3 % more (Phi-2: 1.8 %).
_MAX_SPARE_SHARE = 0.2
_MAX_SPARE_ROWS = 512  # of small vocabularies


def find_num_rows(config: JsonObject) -> int | None:
    """The rows of the model's embedding, as its config.json says; None where it does not."""
    text_config = config.get("text_config")
    for document in (config, text_config if isinstance(text_config, dict) else {}):
        num_rows = document.get("vocab_size")
        if isinstance(num_rows, int) and num_rows > 0:
            return num_rows
    return None


def check_vocabulary(tokenizer: tokenizers.Tokenizer, num_rows: int, path: Path) -> frozenset[int]:
    """The special tokens that a model of `num_rows` tokens has no row for, as Gemma 3's for images.

    Raises:
        CheckpointError: the tokenizer has other tokens beyond them, or far fewer than the model.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    num_ids = 1 + max(vocabulary.values(), default=-1)
    added = tokenizer.get_added_tokens_decoder()
    beyond = frozenset(id_ for id_ in vocabulary.values() if id_ >= num_rows)
    is_too_large = not all(id_ in added and added[id_].special for id_ in beyond)
    if is_too_large or num_rows - num_ids > max(_MAX_SPARE_ROWS, _MAX_SPARE_SHARE * num_rows):
        raise CheckpointError(
            f"{path} has a tokenizer of {num_ids} tokens and a model of {num_rows}:"
            " they are not of each other",
            hint="download the model again, its tokenizer included",
        )
    return beyond
