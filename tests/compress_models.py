"""Tiny random models as steps of a recipe get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastserve.checkpoint.checkpoint import Checkpoint
from fastserve.compress.step import Context, WorkingModel
from fastserve.types import Float32Array
from parity import store_f32
from tiny_models import BERT_CONFIG, LLAMA_CONFIG, random_parameters, tiny_graph

TINY = {"llama": LLAMA_CONFIG, "bert": BERT_CONFIG}


def working_model(config: dict[str, Any], parameters: dict[str, Float32Array] | None = None) -> WorkingModel:
    """Of random parameters, unless some are given."""
    if parameters is None:
        parameters = random_parameters(tiny_graph(config))
    return WorkingModel(
        checkpoint=Checkpoint(
            path=Path("tiny"),
            format="safetensors",
            config=config,
            tensors=store_f32(parameters),
            eos_token_ids=(),
            chat_template=None,
            sentence=None,
            metadata=None,
        )
    )


def random_sequences(
    num: int = 9, *, longest: int = 40, vocab_size: int = 97, seed: int = 3
) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, longest, num)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def make_context(folder: Path, **fields: Any) -> Context:
    known = {"source": Path("tiny"), "scratch": folder, "calibration": random_sequences(), "threads": 1}
    return Context(**{**known, **fields})
