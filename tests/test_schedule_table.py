from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_the_tables_of_the_scheduling_document_are_those_of_the_results() -> None:
    subprocess.run([sys.executable, BENCH / "schedule_table.py", "--check"], check=True)
