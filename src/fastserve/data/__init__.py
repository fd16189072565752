"""Read, check, clean, split, encode and pack labelled data and text.

The simple functions are here, imported on first use; `fastserve prepare` is all of it as one command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.data.load import load_data
    from fastserve.data.problem import PROBLEM_KINDS, Problem, ProblemLog
    from fastserve.data.read import read_rows
    from fastserve.data.reader.option import ReadOptions
    from fastserve.data.row import TASKS, Row

__all__ = ["PROBLEM_KINDS", "TASKS", "Problem", "ProblemLog", "ReadOptions", "Row", "load_data", "read_rows"]

_EXPORTS = {
    **dict.fromkeys(("PROBLEM_KINDS", "Problem", "ProblemLog"), "fastserve.data.problem"),
    "ReadOptions": "fastserve.data.reader.option",
    **dict.fromkeys(("TASKS", "Row"), "fastserve.data.row"),
    "load_data": "fastserve.data.load",
    "read_rows": "fastserve.data.read",
}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastserve.data' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
