from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_bf16, to_f32
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import OptionError
from fastserve.evaluate.model_folder import write_model_folder
from fastserve.evaluate.random_model import (
    SHAPES,
    make_byte_tokenizer,
    make_model,
    shape_graph,
    write_random_model,
)
from fastserve.models.parameters import check_parameters, expected_parameters

TINY = {**SHAPES["smollm2-135m"], "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 6, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 300}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_HOME", str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("shape", "millions"),
    # 1,235.8 and 134.5 are the published counts; Llama's here with 49,152 instead of 128,256 tokens of width
    # 2048, Qwen's 494.03 with 24 biases more, of width 896, BERT's and MiniLM's without their poolers.
    [
        ("llama-3.2-1b", 1235.8 - (128256 - 49152) * 2048 / 1e6),
        ("smollm2-135m", 134.5),
        ("qwen2.5-0.5b", 494.03 + 24 * 896 / 1e6),
        ("bert-base", 109.5 - 0.59),
        ("minilm", 22.7 - 0.15),
    ],
)
def test_shapes_have_the_parameters_of_the_models_they_are_like(shape: str, millions: float) -> None:
    sizes = [np.prod(size) for size in expected_parameters(shape_graph(shape)).values()]
    assert sum(sizes) / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_model_can_be_opened_and_is_complete(tmp_path: Path) -> None:
    num_parameters = write_random_model(TINY, tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    graph = shape_graph_of(checkpoint.config)
    assert check_parameters(graph, checkpoint.tensors) == ()
    assert num_parameters == sum(np.prod(t.shape) for t in checkpoint.tensors.values())
    assert Tokenizer.from_checkpoint(checkpoint).encode("a b", add_special_tokens=False)


def shape_graph_of(config: object) -> object:
    from fastserve.models.family import build_graph, read_config

    return build_graph(read_config(config))  # type: ignore[arg-type]


def test_the_same_shape_is_the_same_model(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_random_model(TINY, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_values_keep_their_size_through_a_matrix(tmp_path: Path) -> None:
    write_random_model(TINY, tmp_path / "m")
    tensors = open_checkpoint(tmp_path / "m").tensors
    down = to_f32(tensors["model.layers.0.mlp.down_proj.weight"])
    assert down.std() == pytest.approx(40**-0.5, rel=0.1)
    assert to_f32(tensors["model.norm.weight"]).mean() == pytest.approx(1, abs=0.05)


def test_a_sparse_model_is_the_dense_one_without_its_smallest_weights(tmp_path: Path) -> None:
    for name, sparsity in (("dense", 0.0), ("sparse", 0.75)):
        write_random_model(TINY, tmp_path / name, sparsity=sparsity)
    dense, sparse = (open_checkpoint(tmp_path / name).tensors for name in ("dense", "sparse"))
    for name, tensor in dense.items():
        before, after = to_f32(tensor), to_f32(sparse[name])
        is_kept = after != 0
        np.testing.assert_array_equal(after[is_kept], before[is_kept])
        if before.ndim == 2:
            assert is_kept.mean() == pytest.approx(0.25, abs=0.01)
            assert np.abs(before[~is_kept]).max() <= np.abs(before[is_kept]).min()
        else:
            assert is_kept.all()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_share_of_zeros_that_is_none_is_refused(sparsity: float, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is no share below 1"):
        make_model("minilm", tmp_path / "m", sparsity=sparsity)


def test_an_unknown_shape_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        make_model("gpt-5", tmp_path / "m")
    assert "gpt-5" in caught.value.message
    assert "llama-3.2-1b" in str(caught.value.hint)
    assert not (tmp_path / "m").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("mine")
    with pytest.raises(OptionError, match="not an empty folder"):
        make_model("minilm", tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_text() == "mine"


def test_every_byte_has_a_token(tmp_path: Path) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(make_byte_tokenizer(400)))
    assert tokenizer.get_vocab_size() == 400
    text = "Gruß, 世界\n\0"
    token_ids = tokenizer.encode(text).ids
    assert len(token_ids) == len(text.encode())
    assert tokenizer.decode(token_ids) == text


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    # 1 + 2^-8 lies half way between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    values = np.asarray([1, 1 + 2**-8, 1 + 3 * 2**-8, -2.5], np.float32)
    back = (to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    assert back.tolist() == [1.0, 1.0, 1 + 2**-6, -2.5]


def test_a_tensor_is_written_from_its_pieces(tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    pieces = [np.arange(4, dtype=np.float32), np.arange(4, 6, dtype=np.float32)]
    write_model_folder(tmp_path, {}, "{}", {"a": (2, 3), "b": (6,)}, lambda name: pieces)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert tensors["a"].dtype == torch.bfloat16
    assert tensors["a"].float().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["b"].float().tolist() == [0, 1, 2, 3, 4, 5]
