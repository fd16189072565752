"""Tuning: from a pretrained model and labelled rows to a model directory that serves a task.

`tune` is the whole path, and needs the extra `[tune]`; `TuneOptions` is what can be chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.tune.options import TuneOptions
    from fastserve.tune.run import TuneResult
    from fastserve.tune.tuning import tune

__all__ = ["TuneOptions", "TuneResult", "tune"]

_EXPORTS = {
    "TuneOptions": "fastserve.tune.options",
    "TuneResult": "fastserve.tune.run",
    "tune": "fastserve.tune.tuning",
}


def __getattr__(name: str) -> object:
    """Import what is re-exported on first use, so that options can be read without what runs."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastserve.tune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
