"""Requests of all sorts against a server in a process of its own, and kills: bench/serve_abuse.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastserve._native")

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_survives_its_clients_and_kills(shared_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "serve_abuse.py"), "--json", str(tmp_path / "abuse.json")]
    command += ["--model", str(shared_data / "model_stories260K"), "--requests", "10000"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    results = json.loads((tmp_path / "abuse.json").read_text())["results"]
    assert sum(results["outcomes"].values()) == 10_000
    assert results["defects"] == results["kill_defects"] == []
