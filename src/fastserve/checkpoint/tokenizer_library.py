"""What building a tokenizer needs beside the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from fastserve.errors import CheckpointError, FastServeError
from fastserve.types import JsonObject

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


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


def steps_of(part: Any) -> Iterator[JsonObject]:
    """The steps of a normalizer, decoder or other part of a tokenizer, as tokenizer.json describes them; of a
    sequence, the last one first.
    """
    pending = [] if part is None else [json.loads(part.__getstate__())]
    while pending:
        step = pending.pop()
        if step["type"] == "Sequence":
            pending += next(value for key, value in step.items() if key != "type")
        else:
            yield step


@contextmanager
def name_panics() -> Iterator[None]:
    """A panic of the library's Rust code, which is no Exception and would end a server, becomes an error; so
    does what it fails with otherwise, which has no class.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"the tokenizer cannot split this text: {error}",
            hint="its files may be damaged: `fastserve models verify NAME` says so",
        ) from error


def add_ends(
    backend: Tokenizer,
    first: str | None,
    last: str | None,
    *,
    num_between: int | None = None,
    second_type_id: int = 0,
) -> None:
    """Make `encode` put these tokens before and behind a text, and of a pair of texts either around each, or
    (`num_between`) `first` before and `last` behind both, and so many of `last` between them. The second text
    of a pair has `second_type_id`.

    Raises:
        CheckpointError: one of them is not in the vocabulary.
    """
    ends = [token for token in (first, last) if token is not None]
    ids = {token: backend.token_to_id(token) for token in ends}
    for token in ends:
        if ids[token] is None:
            raise CheckpointError(f"the special token {token!r} is not in the tokenizer's vocabulary")
    before, behind = ([first] if first else []), ([last] if last else [])
    between = [*behind, *before] if num_between is None else behind * num_between
    second = [f"$B:{second_type_id}", *(f"{token}:{second_type_id}" for token in behind)]
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *between, *second],
        special_tokens=list(ids.items()),
    )


def special_tokens(config: JsonObject) -> dict[str, str]:
    """Those that tokenizer_config.json names, by role: a special token is a text, or an object with its
    content.
    """
    found = {}
    for role in ROLES:
        token = config.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[role] = content
    return found
