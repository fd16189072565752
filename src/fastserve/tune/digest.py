"""Digests of files, for the lineage of what is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def digest_files(paths: Iterable[str | Path]) -> str:
    """SHA-256 of the contents of files, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
    return digest.hexdigest()
