from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.errors import UnsupportedError
from fastserve.evaluate.random_model import SHAPES, write_random_model
from fastserve.evaluate.w8a8_writer import quantize_channels, write_w8a8

TINY = {**SHAPES["smollm2-135m"], "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 6, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 300}
LINEAR = "model.layers.1.mlp.down_proj.weight"


def test_linears_become_int8_with_a_scale_for_each_channel(tmp_path: Path) -> None:
    write_random_model(TINY, tmp_path / "m")
    source = open_checkpoint(tmp_path / "m")
    write_w8a8(source, "{}", tmp_path / "w8a8")
    with safetensors.safe_open(tmp_path / "w8a8" / "model.safetensors", "numpy") as file:
        assert file.get_slice(LINEAR).get_dtype() == "I8"
        assert file.get_slice(LINEAR + "_scale").get_shape() == [24, 1]
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"
        written = file.get_tensor(LINEAR)
        assert set(file.keys()) >= set(source.tensors)
    values, scales = quantize_channels(source.tensors[LINEAR])
    np.testing.assert_array_equal(written, values)
    np.testing.assert_allclose(values * scales, to_f32(source.tensors[LINEAR]), atol=0.51 * scales.max())


def test_the_config_says_how_in_the_schema_that_vllm_reads(tmp_path: Path) -> None:
    write_random_model(TINY, tmp_path / "m")
    write_w8a8(open_checkpoint(tmp_path / "m"), "{}", tmp_path / "w8a8")
    quantization = json.loads((tmp_path / "w8a8" / "config.json").read_text())["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == ("channel", "token")
    assert group["input_activations"]["dynamic"] is True


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 1}
    write_random_model({**SHAPES["minilm"], **shape}, tmp_path / "m")
    with pytest.raises(UnsupportedError, match="text generation"):
        write_w8a8(open_checkpoint(tmp_path / "m"), "{}", tmp_path / "w8a8")
