"""Sorting what does not fit in memory: sorted runs on disk, merged; and groups of equal keys."""

from __future__ import annotations

import heapq
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastserve.option import INT64_MAX, check_integer

_LINE_OVERHEAD_BYTES = 200  # of a line in a run: two objects, a tuple, its key
_MAX_RUNS = 256  # open at a time; more are merged in turns
_FAN_OUT = 64


def sort_lines(
    lines: Iterable[bytes],
    key: Callable[[bytes], Any],
    *,
    memory_bytes: int = 2**28,
    folder: Path | None = None,
) -> Iterator[bytes]:
    """Lines by their keys, in about `memory_bytes` whatever their number; equal keys keep their order.

    Runs that fill the memory are sorted, written to temporary files in `folder` (the system's) and merged.

    >>> list(sort_lines([b"bb\\n", b"a\\n"], len, memory_bytes=2**20))
    [b'a\\n', b'bb\\n']

    Raises:
        OptionError: the memory is less than 1 MiB.
    """
    check_integer("memory_bytes", memory_bytes, low=2**20, high=INT64_MAX)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        runs: list[Path] = []
        run: list[tuple[Any, bytes]] = []
        num_bytes = 0
        for line in lines:
            run.append((key(line), line))
            num_bytes += len(line) + _LINE_OVERHEAD_BYTES
            if num_bytes >= memory_bytes:
                runs.append(_write_run(run, Path(temporary) / f"{len(runs)}.run"))
                run, num_bytes = [], 0
        run.sort(key=itemgetter(0))
        if not runs:
            yield from (line for _, line in run)
            return
        runs.append(_write_run(run, Path(temporary) / f"{len(runs)}.run"))
        del run
        number = len(runs)
        while len(runs) > _MAX_RUNS:
            merged = Path(temporary) / f"{number}.run"
            with merged.open("wb") as file:
                for pair in _merge(runs[:_MAX_RUNS]):
                    pickle.dump(pair, file, pickle.HIGHEST_PROTOCOL)
            for path in runs[:_MAX_RUNS]:
                path.unlink()
            runs = [merged, *runs[_MAX_RUNS:]]  # first again, so that equal keys keep their order
            number += 1
        yield from (line for _, line in _merge(runs))


def groups_of_equal(
    keys: np.ndarray[Any, Any], *, memory_bytes: int = 2**28, folder: Path | None = None
) -> Iterator[np.ndarray[Any, Any]]:
    """Indexes, rising, of each two or more rows whose keys are equal. `keys` are [rows] or [rows, parts],
    64 bits each and spread evenly, as digests are; they may be mapped from a file.

    >>> [group.tolist() for group in groups_of_equal(np.array([7, 3, 7], np.uint64))]
    [[0, 2]]
    """
    if not len(keys):
        return
    keys = keys.reshape(len(keys), -1)
    row_bytes = 8 * (keys.shape[1] + 1) * 4  # key and index, and what sorting copies
    if len(keys) * row_bytes <= memory_bytes:
        yield from _groups(np.asarray(keys), np.arange(len(keys)))
        return
    chunk_rows = max(memory_bytes // row_bytes, 1)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        files: list[BinaryIO] = [(Path(temporary) / f"{part}.keys").open("w+b") for part in range(_FAN_OUT)]
        try:
            for start in range(0, len(keys), chunk_rows):
                chunk = np.asarray(keys[start : start + chunk_rows])
                numbers = np.arange(start, start + len(chunk), dtype=np.uint64)
                rows = np.column_stack([chunk, numbers])
                parts = chunk[:, 0] >> np.uint64(58)  # the highest 6 bits: 64 parts
                order = np.argsort(parts, kind="stable")
                ends = np.searchsorted(parts[order], np.arange(_FAN_OUT + 1))
                for part, file in enumerate(files):
                    rows[order[ends[part] : ends[part + 1]]].tofile(file)
            for file in files:
                file.seek(0)
                rows = np.fromfile(file, np.uint64).reshape(-1, keys.shape[1] + 1)
                yield from _groups(rows[:, :-1], rows[:, -1].astype(np.int64))
        finally:
            for file in files:
                file.close()


def _groups(keys: np.ndarray[Any, Any], indexes: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    if len(keys) < 2:
        return
    order = np.lexsort(keys.T)  # stable: indexes keep rising within a group
    ordered = keys[order]
    is_new = np.any(ordered[1:] != ordered[:-1], axis=1)
    starts = np.concatenate([[0], np.flatnonzero(is_new) + 1, [len(keys)]])
    for at in np.flatnonzero(np.diff(starts) > 1):
        yield indexes[order[starts[at] : starts[at + 1]]]


def _write_run(run: list[tuple[Any, bytes]], path: Path) -> Path:
    run.sort(key=itemgetter(0))
    with path.open("wb") as file:
        for pair in run:
            pickle.dump(pair, file, pickle.HIGHEST_PROTOCOL)
    return path


def _merge(runs: Iterable[Path]) -> Iterator[tuple[Any, bytes]]:
    yield from heapq.merge(*map(_read_run, runs), key=itemgetter(0))


def _read_run(path: Path) -> Iterator[tuple[Any, bytes]]:
    """What we wrote into a folder of our own: nothing else is ever unpickled."""
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return
