"""What the processor is called, for reports that people read."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name(*, proc: Path = Path("/proc")) -> str:
    """The maker's name for the processor where the system knows it, else its architecture."""
    try:
        lines = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (
        value.strip()
        for key, _, value in (line.partition(":") for line in lines)
        if key.strip() == "model name"
    )
    return next(names, "") or platform.processor() or platform.machine() or "unknown processor"
