"""FastServe: from a pretrained language model to an efficient service where resources are short."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastserve._version import __version__

if TYPE_CHECKING:
    from fastserve.constraint import ANY_OBJECT, Choice, Grammar, JsonSchema, Regex
    from fastserve.engine.async_llm import AsyncLLM
    from fastserve.engine.llm import LLM
    from fastserve.engine.pipeline import pipeline
    from fastserve.evaluate.text_report import classification_report
    from fastserve.types import SamplingParams

__all__ = [
    "ANY_OBJECT",
    "LLM",
    "AsyncLLM",
    "Choice",
    "Grammar",
    "JsonSchema",
    "Regex",
    "SamplingParams",
    "__version__",
    "classification_report",
    "pipeline",
]

_EXPORTS = {
    **dict.fromkeys(("ANY_OBJECT", "Choice", "Grammar", "JsonSchema", "Regex"), "fastserve.constraint"),
    "AsyncLLM": "fastserve.engine.async_llm",
    "LLM": "fastserve.engine.llm",
    "SamplingParams": "fastserve.types",
    "classification_report": "fastserve.evaluate.text_report",
    "pipeline": "fastserve.engine.pipeline",
}


def __getattr__(name: str) -> object:
    """Import what is re-exported on first use, so that `import fastserve` stays cheap.

    Besides what `__all__` names, there are the classes that programs of this field import, such as
    `BertForTokenClassification` and `AutoTokenizer`: see `fastserve.tune.familiar`.
    """
    from importlib import import_module

    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name.startswith("_"):
        raise AttributeError(f"module 'fastserve' has no attribute {name!r}")
    found: object = import_module("fastserve.tune.familiar").familiar(name)
    return found
