"""Parquet files, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastserve.data.row import Row
from fastserve.errors import DataError, UnsupportedError

_BATCH_ROWS = 1024


def read_parquet(path: Path) -> Iterator[Row]:
    """A row for each row; its `line` is its number, from 1.

    Raises:
        DataError: the file is missing or broken.
        UnsupportedError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UnsupportedError(
            f"{path}: Parquet needs pyarrow: {error}", hint="pip install 'fastserve-llm[data]'"
        ) from error
    if not path.is_file():
        raise DataError(f"no file is at {path}", hint="give the path of a file")
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    present = {name: value for name, value in fields.items() if value is not None}
                    yield Row(present, file=str(path), line=number)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: broken after row {number}: {error}", hint="mend the file") from error
