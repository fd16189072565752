from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from fastserve.errors import DownloadError
from fastserve.hub import pip
from fastserve.hub.source import SourceUnavailableError
from hub.wheel_index import WheelIndex


def fail_with(messages: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DownloadError:
    monkeypatch.setattr(pip, "_run", lambda command, environment: (1, messages))
    with pytest.raises(DownloadError) as caught:
        pip.download_wheel("tiny==1", sha256=None, attempt=tmp_path)
    return caught.value


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceUnavailableError, match="has no pip") as caught:
        pip.download_wheel("tiny==1", sha256=None, attempt=tmp_path)
    assert "python -m ensurepip" in (caught.value.hint or "")


def test_an_index_out_of_reach_lets_the_next_source_be_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken\nERROR: No matching"
    failure = fail_with(messages, monkeypatch, tmp_path)
    assert isinstance(failure, SourceUnavailableError)
    assert failure.message == "the package index could not be reached for tiny==1"


def test_the_last_error_of_pip_is_the_reason_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = "WARNING: odd\nERROR: Could not find it\nERROR: No matching distribution found for tiny==1\n"
    failure = fail_with(messages, monkeypatch, tmp_path)
    assert isinstance(failure, SourceUnavailableError)
    assert failure.message == "pip could not download tiny==1: No matching distribution found for tiny==1"


@pytest.mark.parametrize("messages", ["[Errno 28] No space left on device", "DO NOT MATCH THE HASHES"])
def test_a_full_disk_or_a_wrong_checksum_ends_the_download(
    messages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not isinstance(fail_with(messages, monkeypatch, tmp_path), SourceUnavailableError)


def test_a_file_named_pip_in_the_current_folder_is_not_run(
    index: WheelIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('not the pip you want')")
    monkeypatch.chdir(tmp_path)
    index.add_model("tiny==1")
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    assert pip.download_wheel("tiny==1", sha256=None, attempt=attempt).name == "tiny-1-py3-none-any.whl"


def test_the_users_settings_reach_pip_and_its_temporary_files_stay_with_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def look(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        seen.update(command=command, environment=environment)
        (tmp_path / "wheels").mkdir()
        (tmp_path / "wheels" / "tiny-1-py3-none-any.whl").touch()
        return 0, ""

    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setattr(pip, "_run", look)
    pip.download_wheel("tiny==1", sha256="0" * 64, attempt=tmp_path)
    assert seen["environment"] == {
        "PIP_RESUME_RETRIES": "5",
        **os.environ,
        "TMPDIR": str(tmp_path / "tmp"),
    }
    command = seen["command"]
    assert isinstance(command, list)
    assert command[:1] == [sys.executable]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)
    assert (tmp_path / "requirements.txt").read_text() == f"tiny==1 --hash=sha256:{'0' * 64}\n"
