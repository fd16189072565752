"""What commands print: one JSON document for machines, one line for an error, tables and sizes for people."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

_MIN_FOLDED_WIDTH = 20  # below it a terminal breaks the lines better than we do


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


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns on a terminal, the last one folded into its width; elsewhere columns parted by
    tabs, as `cut` and `awk` like them.
    """
    lines = [header, *rows]
    if not sys.stdout.isatty():
        for line in lines:
            print("\t".join(line))
        return
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)][:-1]
    left_width = sum(width + 2 for width in widths)
    folded_width = max(shutil.get_terminal_size().columns - left_width, _MIN_FOLDED_WIDTH)
    for *cells, last in lines:
        left = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        first, *others = textwrap.wrap(last, folded_width) or [""]
        print((left + first).rstrip())
        for other in others:
            print(" " * left_width + other)


def format_bytes(num_bytes: int) -> str:
    """A size in decimal units, as disks and download pages give it: 98373789 is `98.4 MB`."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
