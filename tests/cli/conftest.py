"""A store of its own for every test of the commands."""

from __future__ import annotations

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
