"""Compression: a model directory made smaller and faster, the loss measured; needs the extra `[compress]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastserve.compress.compress_run import CompressData, CompressResult
    from fastserve.compress.compression import compress
    from fastserve.compress.recipe import read_recipe, recipe_names
    from fastserve.compress.search import compress_to_budget

__all__ = ["CompressData", "CompressResult", "compress", "compress_to_budget", "read_recipe", "recipe_names"]

_EXPORTS = {
    **dict.fromkeys(("CompressData", "CompressResult"), "fastserve.compress.compress_run"),
    "compress": "fastserve.compress.compression",
    **dict.fromkeys(("read_recipe", "recipe_names"), "fastserve.compress.recipe"),
    "compress_to_budget": "fastserve.compress.search",
}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastserve.compress' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
