"""The special tokens that a tokenizer puts around a text."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from fastserve.errors import CheckpointError


def add_ends(backend: Tokenizer, first: str | None, last: str | None) -> None:
    """Make `encode` put these tokens before and behind a text.

    Raises:
        CheckpointError: one of them is not in the vocabulary.
    """
    ends = [token for token in (first, last) if token is not None]
    ids = {token: backend.token_to_id(token) for token in ends}
    for token in ends:
        if ids[token] is None:
            raise CheckpointError(f"the special token {token!r} is not in the tokenizer's vocabulary")
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=list(ids.items()))
