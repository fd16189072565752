"""Folders and texts that several tests of compression use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def stories_folder(shared_data: Path) -> Path:
    return shared_data / "model_stories260K"


@pytest.fixture(scope="session")
def story_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that the model of stories has something to say about."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    lines = [
        f"Once upon a time, there was a little {kind} named {name}. {name} loved to play in the {place}.\n"
        for kind in ("girl", "boy", "dog", "cat")
        for name in ("Lily", "Tom", "Max")
        for place in ("park", "garden", "house")
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Iterable[Mapping[str, Any]]], Path]:
    """A function of a name and rows that writes them as JSON lines."""

    def write(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def without_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not measured, which takes two processes for each model: every one is said to be as fast."""
    from fastserve.compress.speed import Speed

    def pretend(models: Mapping[str, Path], **_: Any) -> dict[str, Speed]:
        speed = Speed(memory_bytes=10**8, decode_ms=1.0, prefill_ms=2.0, prefill_tokens=128)
        return dict.fromkeys(models, speed)

    monkeypatch.setattr("fastserve.compress.compress_run.measure_speeds", pretend)
