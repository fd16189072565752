"""The examples run as they are, on a real model."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_two_tenants_share_where_they_are_to_and_a_deadline_that_cannot_be_kept_is_refused(
    model_dir: Callable[[str], Path],
) -> None:
    model_dir("smollm2-135m-instruct")
    command = [sys.executable, "-W", "error", str(EXAMPLES / "two_tenants.py")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    alone, shared = (float(seconds) for seconds in re.findall(r"paying ([\d.]+) s", output))
    assert shared < 0.5 * alone
    assert output.count("timeout_ms") == 2
