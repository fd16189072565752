from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map, quants
from transformers import AutoModel, BertConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastserve.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.gguf import read_gguf
from fastserve.errors import CheckpointError, UnsupportedError

Writer = Callable[..., Path]

TINY_BERT = {
    "bert.embedding_length": 32,
    "bert.feed_forward_length": 64,
    "bert.block_count": 2,
    "bert.attention.head_count": 4,
    "bert.context_length": 16,
    "bert.attention.layer_norm_epsilon": 1e-12,
}


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """What conversion does to q and k: `permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def test_stories260k_is_the_same_model_as_gguf_and_as_safetensors(shared_data: Path) -> None:
    folder = shared_data / "model_stories260K"
    gguf, hf = open_checkpoint(folder / "stories260K.gguf"), open_checkpoint(folder)
    assert (gguf.format, hf.format) == ("gguf", "safetensors")
    for name, tensor in hf.tensors.items():
        assert np.array_equal(to_f32(gguf.tensors[name]), to_f32(tensor)), name
    assert set(gguf.tensors) - set(hf.tensors) == {"lm_head.weight"}
    assert np.array_equal(
        to_f32(gguf.tensors["lm_head.weight"]), to_f32(hf.tensors["model.embed_tokens.weight"])
    )
    computed = set(gguf.config) & set(hf.config) - {"pad_token_id", "tie_word_embeddings"}
    assert len(computed) >= 16
    assert {key: gguf.config[key] for key in computed} == {key: hf.config[key] for key in computed}


def test_names_of_llama_are_those_of_transformers_and_of_the_gguf_library(write_tiny_llama: Writer) -> None:
    checkpoint = open_checkpoint(write_tiny_llama())
    with torch.device("meta"):
        model = AutoModel.from_config(LlamaConfig(**checkpoint.config))
    assert set(checkpoint.tensors) == {f"model.{name}" for name in model.state_dict()}
    assert checkpoint.config["tie_word_embeddings"]
    assert_names_agree(MODEL_ARCH.LLAMA, set(read_gguf(checkpoint.path).tensors), set(checkpoint.tensors))


def test_names_of_bert_are_those_of_transformers_and_of_the_gguf_library(write_gguf: Writer) -> None:
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    with torch.device("meta"):
        expected = {
            n: p.shape for n, p in AutoModel.from_config(config).named_parameters() if "pooler" not in n
        }
    to_gguf = get_tensor_name_map(MODEL_ARCH.BERT, 2)
    names = {name: to_gguf.get_name(name, (".weight", ".bias")) for name in expected}
    tensors = {names[name]: np.zeros(shape, np.float32) for name, shape in expected.items()}
    path = write_gguf({**TINY_BERT, "bert.pooling_type": 2}, tensors, architecture="bert")
    checkpoint = open_checkpoint(path)
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == expected
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        assert checkpoint.config[key] == getattr(config, key)
    for key in ("type_vocab_size", "layer_norm_eps", "hidden_act", "model_type"):
        assert checkpoint.config[key] == getattr(config, key)
    assert checkpoint.sentence is not None
    assert checkpoint.sentence.pooling == {"pooling_mode": "cls"}


def assert_names_agree(architecture: MODEL_ARCH, gguf_names: set[str], hf_names: set[str]) -> None:
    to_gguf = get_tensor_name_map(architecture, 2)
    assert {to_gguf.get_name(name, (".weight", ".bias")) for name in hf_names} == gguf_names


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_rows_of_q_and_k_come_back_in_order(write_tiny_llama: Writer, kind: str) -> None:
    random = np.random.default_rng(3)
    q, k = (random.standard_normal((rows, 64)).astype(np.float32) for rows in (64, 32))
    type_ = GGMLQuantizationType[kind]
    path = write_tiny_llama(
        tensors={"blk.1.attn_q.weight": in_pairs(q, 4), "blk.1.attn_k.weight": in_pairs(k, 2)}, kind=type_
    )
    tensors = open_checkpoint(path).tensors
    for name, weight in (("q_proj", q), ("k_proj", k)):
        stored = tensors[f"model.layers.1.self_attn.{name}.weight"]
        assert stored.name == f"model.layers.1.self_attn.{name}.weight"
        assert stored.data.tobytes() == quants.quantize(weight, type_).tobytes()


def test_biases_of_q_are_reordered_with_their_rows_and_set_the_config(write_tiny_llama: Writer) -> None:
    bias = np.arange(64, dtype=np.float32)
    path = write_tiny_llama(tensors={f"blk.{i}.attn_q.bias": in_pairs(bias, 4) for i in range(2)})
    checkpoint = open_checkpoint(path)
    assert to_f32(checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"]).tolist() == bias.tolist()
    assert checkpoint.config["attention_bias"] is True
    assert checkpoint.config["mlp_bias"] is False


def test_an_output_matrix_unties_the_embeddings(write_tiny_llama: Writer) -> None:
    checkpoint = open_checkpoint(write_tiny_llama(tensors={"output.weight": np.zeros((40, 64), np.float32)}))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.tensors["lm_head.weight"].shape == (40, 64)


def test_rope_scaling_of_llama_3_is_recovered_from_its_factors(write_tiny_llama: Writer) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 16, 2, dtype=np.float64) / 16)
    factors = (plain / scaled.numpy()).astype(np.float32)
    path = write_tiny_llama(
        metadata={"llama.rope.freq_base": 500000.0}, tensors={"rope_freqs.weight": factors}
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_parameters"] == rope
    assert "rope_freqs.weight" not in checkpoint.tensors
    with pytest.raises(
        UnsupportedError, match=re.escape("rope_freqs.weight holds no rope scaling of Llama 3.1")
    ):
        open_checkpoint(
            write_tiny_llama(tensors={"rope_freqs.weight": factors * np.linspace(1, 2, 8, dtype="f")})
        )


def test_linear_rope_scaling_is_kept(write_tiny_llama: Writer) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    config = open_checkpoint(write_tiny_llama(metadata=metadata)).config
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.dimension_count": 8}, "rotary embedding of 8 of 16 dimensions"),
        ({"llama.attention.value_length": 32}, "values of 32 dimensions beside keys of 16"),
        ({"llama.attention.head_count": [4, 2]}, "head_count differs between layers"),
        ({"llama.rope.scaling.type": "other"}, "rope scaling 'other', supported are"),
    ],
)  # fmt: skip
def test_a_variation_of_llama_that_we_do_not_have_is_named(
    write_tiny_llama: Writer, metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(write_tiny_llama(metadata=metadata))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.embedding_length": None}, "llama.embedding_length is None, a positive integer"),
        ({"llama.embedding_length": 128}, "embedding_length is 128, token_embd.weight has 64 columns"),
        ({"llama.attention.head_count": 5}, "5 heads do not divide width 64"),
        ({"llama.attention.head_count": 0}, "head_count is 0, a positive integer"),
        ({"llama.attention.head_count_kv": 3}, "3 key-value heads do not divide 4 heads"),
        ({"llama.block_count": 2**31}, "claims 2147483648 layers, the limit is 10000"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "a positive number was expected"),
        ({f"llama.attention.head_count{kv}": 32 for kv in ("", "_kv")}, "32 rows, a multiple of 64"),
    ],
)  # fmt: skip
def test_an_inconsistent_model_is_refused(
    write_tiny_llama: Writer, metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_tiny_llama(metadata=metadata))


def test_an_unknown_tensor_and_an_unknown_architecture_are_named(
    write_tiny_llama: Writer, write_gguf: Writer
) -> None:
    adapter = {"v.blk.0.attn_q.weight": np.zeros((96, 64), np.float32)}
    with pytest.raises(UnsupportedError, match=re.escape("tensor 'v.blk.0.attn_q.weight' is unknown")):
        open_checkpoint(write_tiny_llama(tensors=adapter))
    with pytest.raises(UnsupportedError, match="architecture 'mamba', supported in GGUF are llama, bert, "):
        open_checkpoint(write_gguf({}, {}, architecture="mamba"))


def test_a_vocabulary_alone_is_no_model(shared_data: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape("has no token_embd.weight matrix")):
        open_checkpoint(shared_data / "tokenizer_vectors" / "ggml-vocab-llama-spm.gguf")
