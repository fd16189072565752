"""Families as `fastserve convert --to compressed-tensors` writes them, opened by `transformers` with
compressed-tensors: it computes what we do, since the model of float32 stays one of float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_table import CONFIGS, TEXT, compute, save

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert_checkpoint import convert
from fastserve.models.family import ENCODER_DECODER_FAMILIES, ENCODER_FAMILIES
from fastserve.models.matrices import find_matrices
from fastserve.types import Float32Array
from parity import RANGE_BOUND, range_error

# transformers 5.23 initializes weights of T5 and ModernBERT before it loads them, which a compressed layer
# has not, and joins the experts of no compressed checkpoint; matrices of GPT-2 are none of its linears.
OTHERS = ("t5", "modernbert", "mixtral", "qwen2_moe", "qwen3_moe", "gpt2")


def open_by_transformers(model_type: str, folder: Path) -> Any:
    if model_type in ENCODER_FAMILIES:
        has_pooler = model_type != "distilbert"
        options = {"add_pooling_layer": False} if has_pooler else {}  # which is not saved
        return transformers.AutoModel.from_pretrained(folder, **options)
    if model_type in ENCODER_DECODER_FAMILIES:
        return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def compute_by_transformers(model: Any, model_type: str) -> Float32Array:
    ids = torch.tensor([TEXT])
    options = {"decoder_input_ids": ids} if model_type in ENCODER_DECODER_FAMILIES else {}
    with torch.no_grad():
        output = model(ids, **options)
    if model_type in ENCODER_FAMILIES:
        vectors: Float32Array = output.last_hidden_state[0].numpy().mean(0, keepdims=True)
        return vectors
    return np.asarray(output.logits[0].numpy())


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name not in OTHERS])
def test_transformers_computes_what_we_do(model_type: str, tmp_path: Path) -> None:
    save(model_type, tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    convert(checkpoint, "compressed-tensors", "int8", tmp_path / "written", find_matrices(checkpoint))
    model = open_by_transformers(model_type, tmp_path / "written")
    assert model.dtype is torch.float32
    actual = compute_by_transformers(model, model_type)
    assert range_error(actual, compute(tmp_path / "written", "torch")) < RANGE_BOUND
