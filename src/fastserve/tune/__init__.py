"""Tuning: from a pretrained model and labelled rows to a model directory that serves a task.

Needs the extra `[tune]`; `tune` is the whole path, `TuneOptions` what can be chosen.
"""

from __future__ import annotations

from fastserve.tune.options import TuneOptions
from fastserve.tune.run import TuneResult, tune

__all__ = ["TuneOptions", "TuneResult", "tune"]
