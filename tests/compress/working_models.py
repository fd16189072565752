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
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, hf_model, hf_parameters, random_parameters, tiny_graph

TINY = {"llama": LLAMA_CONFIG, "bert": BERT_CONFIG}


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


def random_working_model(config: dict[str, Any]) -> WorkingModel:
    """Of any config that we read, be it none of `transformers`; with random weights, norms' too."""
    return working_model(config, random_parameters(tiny_graph(config)))


def open_working_model(folder: Path) -> WorkingModel:
    return WorkingModel(checkpoint=open_checkpoint(folder))


def make_context(folder: Path, **fields: Any) -> Context:
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    return Context(source=folder / "source", scratch=folder / "scratch", **fields)


def calibrated_context(folder: Path, **fields: Any) -> Context:
    """With short texts of unequal lengths, unless it is given others."""
    return make_context(folder, **{"calibration": ragged_sequences(), "threads": 1, **fields})


def values_of(model: WorkingModel, name: str) -> Float32Array:
    return to_f32(model.tensors[name])


def all_values(model: WorkingModel) -> dict[str, Float32Array]:
    return {name: to_f32(tensor) for name, tensor in model.tensors.items()}


def random_sequences(vocab_size: int, count: int, length: int, *, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [list(map(int, rng.integers(0, vocab_size, length))) for _ in range(count)]


def ragged_sequences(
    num: int = 9, *, longest: int = 40, vocab_size: int = 97, seed: int = 3
) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, longest, num)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]
