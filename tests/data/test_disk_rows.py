from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.data import DiskRows, Row
from fastserve.errors import DataError


def make(folder: Path, num_rows: int, memory_bytes: int) -> DiskRows:
    rows = (
        Row({"text": f"é {index}", "n": index}, file="a.jsonl", line=index + 1) for index in range(num_rows)
    )
    return DiskRows.from_rows(rows, folder, memory_bytes=memory_bytes)


def test_rows_are_a_sequence_that_knows_where_each_was_read(tmp_path: Path) -> None:
    with make(tmp_path, 100, 2**20) as rows:
        assert len(rows) == 100
        assert rows[7] == {"text": "é 7", "n": 7}
        assert rows[-1].place == "a.jsonl:100"
        assert [row["n"] for row in rows[10:13]] == [10, 11, 12]
        assert [row["n"] for row in rows] == list(range(100))
        with pytest.raises(IndexError, match="row 100 of 100"):
            rows[100]


def test_rows_used_lately_are_kept_within_the_memory_and_others_read_again(tmp_path: Path) -> None:
    with make(tmp_path, 1000, 2000) as rows:
        kept = rows[3]
        assert rows[3] is kept
        for index in range(100, 200):
            rows[index]
        assert rows._cached_bytes <= 2000
        again = rows[3]
        assert again == kept
        assert again is not kept


def test_what_was_written_is_opened_later(tmp_path: Path) -> None:
    make(tmp_path, 5, 0).close()
    with DiskRows(tmp_path) as rows:
        assert [row["n"] for row in rows] == [0, 1, 2, 3, 4]
    make(tmp_path / "none", 0, 0).close()
    with DiskRows(tmp_path / "none") as rows:
        assert len(rows) == 0
    with pytest.raises(DataError, match="no rows are at"):
        DiskRows(tmp_path / "absent")
