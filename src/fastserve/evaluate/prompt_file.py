"""Prompts out of published data sets: JSON objects, with the prompt in a field that such sets use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastserve.errors import TraceError

FIELDS = ("prompt", "question", "instruction", "turns", "conversations", "messages")
_TEXT_FIELDS = ("value", "content")  # of a conversation's turn


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order; of a conversation the first turn.

    Raises:
        TraceError: it cannot be read, is no JSON, or an object has no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        records = json.loads(text) if text.lstrip().startswith("[") else _read_lines(text)
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise TraceError(
            f"{path} is no data set of prompts: {error}", hint="give JSON, an object a line or a list of them"
        ) from error
    prompts = []
    for number, record in enumerate(records, start=1):
        prompt = _prompt_of(record)
        if not prompt:
            raise TraceError(
                f"object {number} of {path} has no prompt", hint=f"put it in one of {', '.join(FIELDS)}"
            )
        prompts.append(prompt)
    if not prompts:
        raise TraceError(f"{path} holds no prompts", hint="give a data set that has some")
    return prompts


def _read_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _prompt_of(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    value = next((record[name] for name in FIELDS if record.get(name)), None)
    if isinstance(value, list):
        value = value[0]
    if isinstance(value, dict):
        value = next((value[name] for name in _TEXT_FIELDS if value.get(name)), None)
    return value if isinstance(value, str) else None
