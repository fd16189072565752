"""Keys of rows by what they say, so that equal ones are found without keeping any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from fastserve.data.row import texts_of
from fastserve.data.tag_scheme import read_spans


def text_of(row: Mapping[str, Any]) -> str:
    """All texts of a row as one, space counting as one space, and where its arguments are: what tells it from
    others."""
    texts = [" ".join(text.split()) for text in texts_of(row)]
    arguments = [
        f"{row[name]['start']} {row[name]['end']}" for name in ("head", "tail") if _is_span(row, name)
    ]
    return "\x1f".join([*texts, *arguments])


def text_key(row: Mapping[str, Any]) -> tuple[int, int]:
    """128 bits of what a row says without its labels: two numbers of 64 bits."""
    digest = blake2b(text_of(row).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _is_span(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), dict)


def label_key(row: Mapping[str, Any]) -> int:
    """64 bits of what a row teaches, whatever the scheme of its tags."""
    taught: list[object] = [row[name] for name in ("label", "labels", "entities", "answers") if name in row]
    if "tags" in row:
        taught.append(read_spans(row["tags"]))
    return value_key(taught) if taught else 0


def id_key(value: object) -> int:
    """64 bits of an id; never 0, which stands for none."""
    return value_key(value) | 1


def value_key(value: object) -> int:
    """64 bits of a value of JSON."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
