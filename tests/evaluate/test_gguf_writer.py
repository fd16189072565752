from __future__ import annotations

from pathlib import Path

import numpy as np

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.evaluate.gguf_writer import write_gguf
from fastserve.evaluate.random_model import SHAPES, write_random_model

TINY = {**SHAPES["smollm2-135m"], "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 6, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 300}


def test_a_model_written_as_gguf_reads_back_as_itself(tmp_path: Path) -> None:
    write_random_model(TINY, tmp_path / "m")
    folder = open_checkpoint(tmp_path / "m")
    write_gguf(folder, tmp_path / "m.gguf")
    file = open_checkpoint(tmp_path / "m.gguf")
    assert file.tensors.keys() == folder.tensors.keys()
    for name in folder.tensors:
        # bfloat16 to float16: exact but for what underflows.
        np.testing.assert_allclose(to_f32(file.tensors[name]), to_f32(folder.tensors[name]), atol=1e-7)
    same = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rope_theta", "tie_word_embeddings")
    assert {key: file.config.get(key) for key in same} == {key: folder.config.get(key) for key in same}
