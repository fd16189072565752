from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.errors import OptionError
from fastserve.hub.location import is_offline, store_home


def test_the_store_is_where_fastserve_home_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path))
    assert store_home() == tmp_path


def test_the_store_is_in_the_cache_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTSERVE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert store_home() == tmp_path / ".cache" / "fastserve"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store_home() == tmp_path / "cache" / "fastserve"


def test_a_relative_cache_folder_is_ignored_as_its_specification_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FASTSERVE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert store_home() == tmp_path / ".cache" / "fastserve"


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("YES", True), ("0", False), ("", False)])
def test_offline_is_read_as_yes_or_no(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("FASTSERVE_OFFLINE", value)
    assert is_offline() is expected


def test_an_unclear_offline_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_OFFLINE", "maybe")
    with pytest.raises(OptionError, match="FASTSERVE_OFFLINE=maybe"):
        is_offline()
