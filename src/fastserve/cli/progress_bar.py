"""The bar that a terminal shows while bytes come; nothing is drawn where standard error is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

    from fastserve.hub.progress import Progress


@contextmanager
def download_progress(*, shown: bool = True) -> Iterator[Progress | None]:
    """Yield what a download reports its progress to, or None where no bar is to be drawn."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    bar: tqdm | None = None

    def show(step: str, done_bytes: int, total_bytes: int | None) -> None:
        nonlocal bar
        if bar is None:
            bar = _draw_bar(step, done_bytes, total_bytes)
        bar.set_description(step, refresh=False)
        bar.total = total_bytes
        bar.update(done_bytes - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def row_progress(*, shown: bool = True) -> Iterator[Callable[[str, int], None] | None]:
    """Yield what a command that goes through rows reports its step to, and how many rows it has done; None
    where no bar is to be drawn."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bar = tqdm(unit=" rows", dynamic_ncols=True, leave=False)

    def show(step: str, num_rows: int) -> None:
        if bar.desc != f"{step}: ":
            bar.reset()
            bar.set_description(step, refresh=False)
        bar.update(num_rows - bar.n)

    try:
        yield show
    finally:
        bar.close()


@contextmanager
def step_progress(*, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what a command of several steps reports what it does to, how many are done, and of how many;
    where no bar is to be drawn nothing comes of it."""
    if not shown or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from tqdm import tqdm

    bar = tqdm(dynamic_ncols=True, leave=False)

    def show(what: str, done: int, total: int) -> None:
        if bar.desc != f"{what}: ":
            bar.reset(total=total)
            bar.set_description(what, refresh=False)
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        bar.close()


def _draw_bar(step: str, done_bytes: int, total_bytes: int | None) -> tqdm:
    """A bar that vanishes when closed; its speed leaves out `done_bytes`, left by what came earlier."""
    from tqdm import tqdm

    return tqdm(
        desc=step,
        initial=done_bytes,
        total=total_bytes,
        miniters=1,  # draw at every report, however few bytes came
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        leave=False,
    )
