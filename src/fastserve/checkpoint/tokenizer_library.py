"""What building a tokenizer needs beside the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from fastserve.errors import CheckpointError, FastServeError


@contextmanager
def name_errors(path: Path) -> Iterator[None]:
    """Errors of the library, which has no classes for them, become a CheckpointError that names the file."""
    try:
        yield
    except (FastServeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        raise CheckpointError(
            f"{path} holds no valid tokenizer: {error}", hint="download the model again"
        ) from error


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
