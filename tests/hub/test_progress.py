from __future__ import annotations

import threading
from pathlib import Path

from fastserve.hub.progress import folder_bytes, watch_folder


def test_bytes_that_appear_in_the_folder_are_reported_on_top_of_those_done_before(tmp_path: Path) -> None:
    seen = threading.Event()
    reports: list[tuple[str, int, int | None]] = []

    def report(step: str, done_bytes: int, total_bytes: int | None) -> None:
        reports.append((step, done_bytes, total_bytes))
        if done_bytes == 1500:
            seen.set()

    with watch_folder(tmp_path, "part 2", report, done_bytes=1000, total_bytes=3000):
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "file").write_bytes(bytes(500))
        assert seen.wait(timeout=10)
    assert reports[-1] == ("part 2", 1500, 3000)


def test_what_is_done_stays_done_when_temporary_files_vanish(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(500))
    reported = threading.Semaphore(0)
    reports: list[int] = []

    def report(step: str, done_bytes: int, total_bytes: int | None) -> None:
        reports.append(done_bytes)
        reported.release()

    with watch_folder(tmp_path, "step", report):
        assert reported.acquire(timeout=10)
        (tmp_path / "file").unlink()
        assert reported.acquire(timeout=10)
        assert reported.acquire(timeout=10)
    assert set(reports) == {500}


def test_no_thread_outlives_the_watching(tmp_path: Path) -> None:
    before = threading.active_count()
    with watch_folder(tmp_path, "step", lambda *report: None):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    assert folder_bytes(tmp_path / "missing") == 0
