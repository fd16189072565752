"""Folders and texts that several tests of compression use."""

from __future__ import annotations

from pathlib import Path

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
