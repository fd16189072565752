from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.data.external_sort import groups_of_equal, sort_lines
from fastserve.errors import OptionError


@pytest.mark.parametrize("memory_bytes", [2**20, 2**26])
def test_lines_come_sorted_and_equal_keys_keep_their_order(tmp_path: Path, memory_bytes: int) -> None:
    generator = np.random.default_rng(0)
    lines = [b"%03d %d" % (key, at) for at, key in enumerate(generator.integers(0, 50, 20_000))]
    found = list(sort_lines(iter(lines), lambda line: line[:3], memory_bytes=memory_bytes, folder=tmp_path))
    assert found == sorted(lines, key=lambda line: line[:3])
    assert not list(tmp_path.iterdir())  # the runs are gone


def test_more_runs_than_files_may_be_open_are_merged_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastserve.data.external_sort._MAX_RUNS", 3)
    lines = [b"%06d" % (at * 7919 % 30_000) for at in range(30_000)]
    assert list(sort_lines(lines, bytes, memory_bytes=2**20, folder=tmp_path)) == sorted(lines)


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(OptionError, match="memory_bytes"):
        list(sort_lines([], len, memory_bytes=100))


@settings(deadline=None)  # it says how busy the machine is
@given(st.lists(st.integers(0, 9), max_size=60), st.sampled_from([64, 1000, 2**20]), st.integers(1, 2))
def test_groups_of_equal_keys_are_those_of_a_dict(values: list[int], memory_bytes: int, parts: int) -> None:
    spread = np.array(values, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys = spread if parts == 1 else np.column_stack([spread, spread ^ np.uint64(7)])
    expected: dict[int, list[int]] = {}
    for index, value in enumerate(values):
        expected.setdefault(value, []).append(index)
    found = [group.tolist() for group in groups_of_equal(keys, memory_bytes=memory_bytes)]
    assert sorted(found) == sorted(group for group in expected.values() if len(group) > 1)
