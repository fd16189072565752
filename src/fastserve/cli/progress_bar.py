"""The bar that a terminal shows while bytes come; nothing is drawn where standard error is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.hub.progress import Progress


@contextmanager
def download_progress(*, shown: bool = True) -> Iterator[Progress | None]:
    """Yield what a download reports its progress to, or None where no bar is to be drawn."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=None)

    def show(step: str, done_bytes: int, total_bytes: int | None) -> None:
        bar.start()
        bar.update(task, description=step, completed=done_bytes, total=total_bytes)

    try:
        yield show
    finally:
        bar.stop()
