"""Files of a few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings


@pytest.fixture(scope="package", autouse=True)
def _without_deadline() -> Iterator[None]:
    """How long an example of hypothesis takes says how busy the machine is."""
    settings.register_profile("data", deadline=None, max_examples=50)
    before = settings.get_current_profile_name()
    settings.load_profile("data")
    yield
    settings.load_profile(before)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file of a name and give its path; text in UTF-8, with the line ends that it has."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
