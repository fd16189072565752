"""Opens a model for serving, whichever kind it is."""

from __future__ import annotations

from pathlib import Path

from fastserve.config import EngineOptions
from fastserve.engine.async_embedder import AsyncEmbedder
from fastserve.engine.async_llm import AsyncLLM
from fastserve.engine.load import load_model
from fastserve.serve.model_table import ServedModel


def open_model(path: Path, options: EngineOptions, *, name: str) -> ServedModel:
    """Load the model in a folder or .gguf file, to generate text or to embed. Raises as `load_model`."""
    model = load_model(path, options, name=name)
    if model.is_decoder:
        return AsyncLLM(model, options, name=name)
    return AsyncEmbedder(model, name=name, max_waiting=options.max_waiting)
