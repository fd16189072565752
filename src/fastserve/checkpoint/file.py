"""Reading the files of a model: mapped bytes and small JSON documents, with errors that name the file."""

from __future__ import annotations

import errno
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastserve.errors import CheckpointError, MemoryLimitError
from fastserve.types import JsonObject

MAX_BYTES = 256 * 2**20  # tokenizer.json of the largest vocabularies is some 35 MB


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, mapped read-only; the mapping lives as long as a view of it does.

    Raises:
        CheckpointError: the file cannot be opened or is empty.
        MemoryLimitError: it is larger than the address space that is left.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{path} is empty", hint="download the model again")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryLimitError(
                f"{path} of {size} bytes does not fit in the address space that this process has left",
                hint="raise its limit (ulimit -v), or use a smaller model",
            ) from error
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return np.frombuffer(mapped, dtype=np.uint8)


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, too large, not JSON, or holds something else than an object.
    """
    return parse_json(read_bytes(path), str(path))


def read_json_list(path: Path) -> list[JsonObject]:
    """The objects in a JSON file that holds a list of them. Raises as `read_json`."""
    document = _parse(read_bytes(path), str(path))
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise CheckpointError(f"{path} is no JSON list of objects")
    return document


def read_bytes(path: Path) -> bytes:
    """The contents of a file that belongs in memory whole: JSON, a template.

    Raises:
        CheckpointError: the file is missing or too large.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, the limit is {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def read_optional_json(path: Path) -> JsonObject:
    """`read_json`, or an empty object where there is no such file."""
    return read_json(path) if path.is_file() else {}


def parse_json(text: bytes, what: str) -> JsonObject:
    """The object in a JSON document; a repeated key is an error, for nobody could say which one counts.

    Raises:
        CheckpointError: `what` is not JSON, repeats a key, or is no object.
    """
    document = _parse(text, what)
    if not isinstance(document, dict):
        raise CheckpointError(f"{what} holds a JSON {type(document).__name__}, an object was expected")
    return document


def _parse(text: bytes, what: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and endless digits
        raise CheckpointError(
            f"{what} is not valid JSON: {error}", hint="download the model again"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is repeated")
    return found
