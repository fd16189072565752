"""Promised bounds that no clock has a part in, measured by the benchmarks: `make test-slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parent.parent

MEAN_KL = {"int8": 0.01, "bf16": 0.001}

pytestmark = pytest.mark.slow


def run_benchmark(name: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The results of a script of bench/."""
    results = tmp_path / "results.json"
    script = CHECKOUT / "bench" / f"{name}.py"
    subprocess.run(
        [sys.executable, str(script), "--json", str(results), *arguments], check=True, cwd=CHECKOUT
    )
    return json.loads(results.read_text())["results"]


def test_quantized_weights_stay_close_to_float32_on_wikitext(shared_data: Path, tmp_path: Path) -> None:
    results = run_benchmark("quality", tmp_path, "--weights", *MEAN_KL, "--tokens", "8192")
    for weights, bound in MEAN_KL.items():
        assert results[weights]["mean_kl"] <= bound
