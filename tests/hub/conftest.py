"""A store in a temporary folder, an index for pip, and a catalogue of the test's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastserve.hub.catalogue import CatalogueEntry
from fastserve.hub.source import Source
from fastserve.hub.wheel_source import Wheel, WheelSource
from hub.wheel_index import MODEL_FILES, WheelIndex


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, used by every test of this folder so that none touches the user's."""
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "store"))
    monkeypatch.delenv("FASTSERVE_OFFLINE", raising=False)
    return tmp_path / "store"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelIndex:
    """A package index of wheels built here, set as a user sets his: by pip's environment variables."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return WheelIndex(folder)


@dataclass(frozen=True)
class CatalogueOf:
    """Replaces the shipped catalogue by one entry of the test's own sources."""

    monkeypatch: pytest.MonkeyPatch

    def __call__(self, name: str, *sources: Source | Wheel) -> CatalogueEntry:
        entry = CatalogueEntry(
            name=name,
            title=name,
            licence="MIT",
            architecture="llama",
            size_bytes=sum(map(len, MODEL_FILES.values())),
            sources=tuple(WheelSource((s,)) if isinstance(s, Wheel) else s for s in sources),
        )
        for module in ("fastserve.hub.catalogue", "fastserve.hub.registry"):
            self.monkeypatch.setattr(f"{module}.load_catalogue", lambda: (entry,))
        return entry


@pytest.fixture
def catalogue_of(monkeypatch: pytest.MonkeyPatch) -> CatalogueOf:
    return CatalogueOf(monkeypatch)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder of the user's that holds a model."""
    folder = tmp_path / "My-Model"
    folder.mkdir()
    for name, data in MODEL_FILES.items():
        (folder / name).write_bytes(data)
    (folder / "training.log").write_text("not part of the model")
    return folder
