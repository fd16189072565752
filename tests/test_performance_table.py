"""The tables of the documents are what the results say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("performance_table")


def make_peer(rate: float, *, low: float, memory: int) -> dict[str, Any]:
    ratio = {"median": 1000 / rate, "low": low, "high": 2 * low, "num_samples": 7}
    return {
        "decode_1_tokens_per_second": rate,
        "start_to_first_token_seconds": 3.0,
        "peak_memory_bytes": memory,
        "runs": {"decode_1_tokens_per_second": [rate, rate]},
        "ratios": {"decode_1_tokens_per_second": ratio},
    }


@pytest.fixture
def documents() -> dict[str, Any]:
    """A model of two peers: the fast one takes much memory."""
    results = {
        "decode_1_tokens_per_second": 1000.0,
        "start_to_first_token_seconds": 0.5,
        "peak_memory_bytes": 300_000_000,
        "peers": {
            "fast": make_peer(500, low=1.9, memory=900_000_000),
            "small": make_peer(100, low=9.0, memory=299_000_000),
        },
    }
    return {"smollm2-135m-int8": {"results": results}}


def test_the_documents_hold_the_tables_of_the_results() -> None:
    subprocess.run([sys.executable, BENCH / "performance_table.py", "--check"], check=True)


def test_the_best_peer_of_every_column_is_the_one_compared_with(
    tables: ModuleType, documents: dict[str, Any]
) -> None:
    lines = tables.performance_table(documents).splitlines()
    assert "| SmolLM2-135M | int8 | decode, tokens/s | 1,000 | fast 500 | 2.00 [1.90, 3.80] |" in lines
    assert any("peak memory, MB | 300 | small 299" in line for line in lines)


def test_a_target_is_met_at_the_lower_bound_alone(tables: ModuleType, documents: dict[str, Any]) -> None:
    lines = tables.target_table(documents).splitlines()
    assert any("decode, tokens/s against fast | ≥ 1.7 | 2.00 [1.90, 3.80] | yes" in line for line in lines)
    ratio = documents["smollm2-135m-int8"]["results"]["peers"]["fast"]["ratios"]["decode_1_tokens_per_second"]
    ratio["low"] = 1.69
    lines = tables.target_table(documents).splitlines()
    assert any("decode, tokens/s against fast" in line and line.endswith("**no** |") for line in lines)


def test_memory_is_held_against_the_smallest_peer(tables: ModuleType, documents: dict[str, Any]) -> None:
    lines = tables.target_table(documents).splitlines()
    assert any("peak memory, MB | < 299 | 300 | **no**" in line for line in lines)


def test_shares_of_kernels_are_weighted_by_their_time(tables: ModuleType) -> None:
    kernels = [
        {"op": "linear", "weights": "int8", "rows": 1, "seconds": 3.0, "share_of_read": 0.8},
        {"op": "linear", "weights": "int8", "rows": 1, "seconds": 1.0, "share_of_read": 0.4},
        {"op": "linear", "weights": "int4", "rows": 1, "seconds": 1.0, "share_of_read": 0.1},
    ]
    assert tables.mean_share(kernels, "int8", 1, "share_of_read") == pytest.approx(0.7)


def test_only_what_lies_between_the_marks_is_replaced(tables: ModuleType) -> None:
    text = "before\n<!-- table performance -->\nold\n<!-- end of table -->\nafter\n"
    updated = tables.insert(text, {"performance": "| new |", "targets": "| other |"})
    assert updated == "before\n<!-- table performance -->\n| new |\n<!-- end of table -->\nafter\n"
