from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A real Llama of 260k parameters with a context of 512 that writes small stories."""
    return shared_data / "model_stories260K"


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that is installed."""
    pytest.importorskip({"native": "fastserve._native", "torch": "torch"}[request.param])
    return request.param
