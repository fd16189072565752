"""What commands print: one JSON document for machines, one line for an error, sizes for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one JSON document that a command with `--json` writes to standard output."""
    print(json.dumps(document, ensure_ascii=False, indent=2))


def print_error(kind: str, message: str, hint: str | None, *, as_json: bool) -> None:
    """Print an error as one line on standard error, or, for machines, as a document on standard output.

    The line is `error: <message>; <hint>`, the document
    `{"error": {"type": kind, "message": message, "hint": hint}}`.
    """
    if as_json:
        print_json({"error": {"type": kind, "message": message, "hint": hint}})
        return
    text = f"{message}; {hint}" if hint else message
    print(f"error: {' '.join(text.split())}", file=sys.stderr)


def format_bytes(num_bytes: int) -> str:
    """A size in decimal units, as disks and download pages give it: 98373789 is `98.4 MB`."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
