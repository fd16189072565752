"""A store of its own for every test of the commands."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model store, used instead of the user's."""
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "store"))
    monkeypatch.delenv("FASTSERVE_OFFLINE", raising=False)
    return tmp_path / "store"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A file with the name of a model, enough for the store."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF" * 1000)
    return path


@pytest.fixture
def pipe_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], None]:
    """Make this the standard input, in UTF-8."""

    def pipe_in(content: str | bytes) -> None:
        data = content.encode() if isinstance(content, str) else content
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return pipe_in
