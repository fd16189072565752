"""Writes model folders as Hugging Face has them, tensor by tensor, so that memory stays small."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from fastserve.checkpoint.convert import to_bf16
from fastserve.types import Float32Array, JsonObject

WEIGHTS_FILE = "model.safetensors"

Shapes = Mapping[str, tuple[int, ...]]
Blocks = Callable[[str], Iterable[Float32Array]]
"""The values of a tensor in consecutive pieces, row-major."""


def write_model_folder(
    folder: Path,
    config: JsonObject,
    tokenizer: str,
    shapes: Shapes,
    blocks: Blocks,
    integers: Collection[str] = (),
) -> None:
    """Write config.json, tokenizer.json and model.safetensors (see `write_safetensors`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    write_safetensors(folder / WEIGHTS_FILE, shapes, blocks, integers)


def write_safetensors(path: Path, shapes: Shapes, blocks: Blocks, integers: Collection[str] = ()) -> None:
    """Write tensors as bfloat16, those named in `integers` as int8, whose values they then are. Format:
    github.com/huggingface/safetensors, README."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        dtype, element_bytes = ("I8", 1) if name in integers else ("BF16", 2)
        end = position + element_bytes * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in shapes:
            for block in blocks(name):
                values = block.astype(np.int8) if name in integers else to_bf16(block)
                file.write(values.tobytes())
