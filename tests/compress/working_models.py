"""Tiny random models between two steps of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.compress.step import Context, WorkingModel
from fastserve.types import Float32Array
from parity import store_f32
from tiny_models import hf_model, hf_parameters


def working_model(config: dict[str, Any], weights: Mapping[str, Float32Array] | None = None) -> WorkingModel:
    """A model of `transformers` for a config of `tiny_models`, with its random weights or others."""
    if weights is None:
        weights = hf_parameters(hf_model(config))
    return WorkingModel(
        checkpoint=Checkpoint(
            path=Path("tiny"),
            format="safetensors",
            config=dict(config),
            tensors=store_f32(dict(weights)),
            eos_token_ids=(),
            chat_template=None,
            sentence=None,
            metadata=None,
        )
    )


def open_working_model(folder: Path) -> WorkingModel:
    return WorkingModel(checkpoint=open_checkpoint(folder))


def make_context(folder: Path, **fields: Any) -> Context:
    (folder / "scratch").mkdir(exist_ok=True)
    return Context(source=folder / "source", scratch=folder / "scratch", **fields)


def values_of(model: WorkingModel, name: str) -> Float32Array:
    return to_f32(model.tensors[name])


def all_values(model: WorkingModel) -> dict[str, Float32Array]:
    return {name: to_f32(tensor) for name, tensor in model.tensors.items()}


def random_sequences(vocab_size: int, count: int, length: int, *, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [list(map(int, rng.integers(0, vocab_size, length))) for _ in range(count)]
