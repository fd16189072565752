from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.errors import OptionError
from fastserve.hub.name_table import NameTable, PinnedModel

PINNED = PinnedModel("one", "digest")


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert NameTable.read(tmp_path) == NameTable()
    table = NameTable().with_alias("a", "b").with_version("c", "1", PINNED).with_promoted("c", "1")
    table.write(tmp_path)
    assert NameTable.read(tmp_path) == table
    assert [path.name for path in tmp_path.iterdir()] == ["names.json"]


def test_what_is_taken_out_takes_its_promotion_with_it() -> None:
    table = NameTable().with_version("c", "1", PINNED).with_version("c", "2", PINNED).with_promoted("c", "2")
    assert table.without("C@2") == NameTable().with_version("c", "1", PINNED)
    assert table.without("c@2").without("c@1") == NameTable()


def test_an_alias_of_itself_in_an_edited_table_is_no_endless_loop() -> None:
    table = NameTable(aliases={"a": "b", "b": "a"})
    with pytest.raises(OptionError, match="stands for itself"):
        table.follow("a")
