from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastserve.checkpoint.grouped_tensor import GroupedTensor
from fastserve.checkpoint.tensor import StoredTensor, TensorFormat
from fastserve.errors import UnsupportedError
from fastserve.evaluate.random_model import SHAPES, write_random_model
from fastserve.evaluate.task.embedding import Embedding
from fastserve.tune.source_model import load_model, open_source_model
from packed_model import pack_model, pruned

TINY = {**SHAPES["minilm"], "hidden_size": 64, "num_attention_heads": 2}
TINY |= {"intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 320}


def test_what_transformers_cannot_read_is_refused_with_a_remedy(tmp_path: Path) -> None:
    write_random_model(TINY, tmp_path / "source")

    def make(tensor: StoredTensor) -> GroupedTensor | None:
        if len(tensor.shape) != 2 or "embeddings" in tensor.name:
            return None
        return pruned(tensor, share_of_zeros=0.5, bits=8, group_size=0, scale_format=TensorFormat.BF16)

    pack_model(tmp_path / "source", tmp_path / "packed", make)
    torch.manual_seed(0)
    source = open_source_model("packed", tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="packed is packed in a form that transformers") as caught:
        load_model(source, Embedding(max_length=16), dropout=None)
    assert "fastserve convert --to safetensors" in str(caught.value.hint)
