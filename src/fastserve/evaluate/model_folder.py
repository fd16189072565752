"""Writes model folders as Hugging Face has them, of numbers that are made while they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fastserve.checkpoint.convert import to_bf16
from fastserve.checkpoint.safetensors_writer import WrittenTensor, write_safetensors
from fastserve.types import Float32Array, JsonObject

WEIGHTS_FILE = "model.safetensors"

Shapes = Mapping[str, tuple[int, ...]]
Blocks = Callable[[str], Iterable[Float32Array]]
"""The values of a tensor in consecutive pieces, row-major."""


def write_model_folder(
    folder: Path, config: JsonObject, tokenizer: str, shapes: Shapes, blocks: Blocks
) -> None:
    """Write config.json, tokenizer.json and model.safetensors, its tensors as bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    write_safetensors(
        folder / WEIGHTS_FILE, [_written(name, shape, blocks) for name, shape in shapes.items()]
    )


def _written(name: str, shape: tuple[int, ...], blocks: Blocks) -> WrittenTensor:
    return WrittenTensor(name, "BF16", shape, lambda: map(to_bf16, blocks(name)))
