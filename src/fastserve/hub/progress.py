"""How a long download says how far it is."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

_POLL_SECONDS = 0.1


class Progress(Protocol):
    """Called from any thread, some ten times a second: it must be quick and must not raise."""

    def __call__(self, step: str, done_bytes: int, total_bytes: int | None, /) -> None:
        """`step` names what is being done; `total_bytes` is None while it is not known."""
        ...


@contextmanager
def watch_folder(
    folder: Path, step: str, progress: Progress | None, *, done_bytes: int = 0, total_bytes: int | None = None
) -> Iterator[None]:
    """Report `done_bytes` plus what lies in `folder` while the body, which writes there, runs.

    Bytes on disk are the one measure of progress that every downloader and every version of it shares.
    """
    if progress is None:
        yield
        return
    report = progress
    ended = threading.Event()

    def poll() -> None:
        most_bytes = 0  # a downloader's temporary files vanish at the end, and what is done stays done
        while not ended.wait(_POLL_SECONDS):
            most_bytes = max(most_bytes, folder_bytes(folder))
            report(step, done_bytes + most_bytes, total_bytes)

    thread = threading.Thread(target=poll, name="fastserve-download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def folder_bytes(folder: Path) -> int:
    """The bytes of all files under a folder; files that vanish meanwhile count as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
