"""Families as `fastserve convert --to gguf` writes them: read back they compute what `transformers` does, by
the names and numbers of the `gguf` library. (llama.cpp is held to them by bench/families_in_llama_cpp.py.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_table import CONFIGS, SAID_IN_GGUF, compute, save
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

from decoder_configs import DECODERS
from encoder_decoder_configs import ENCODER_DECODERS
from fastserve.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastserve.checkpoint.conversion import Conversion, ConvertedWeights
from fastserve.checkpoint.convert import to_f32
from fastserve.checkpoint.convert_checkpoint import convert
from fastserve.checkpoint.gguf_arrangement import change_there
from fastserve.checkpoint.gguf_modules import find_place
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.models.matrices import find_matrices
from parity import RANGE_BOUND, range_error
from sentence_pieces import english_lines, train_pieces
from tiny_encoders import ENCODERS

FEATURES = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
# What GGUF has no key for, or llama.cpp computes in one way only, with the part of the message that says so.
REFUSED = {
    "llama, dynamic rope": "rope scaling 'dynamic'",
    "llama, yarn rope by mscales": "rope scaling with beta_fast, beta_slow, mscale, mscale_all_dim",
    "llama, longrope": "rope scaling 'longrope'",
    "qwen2, tied, windows": "use_sliding_window=True",
    "qwen3, biases, windows by layer": "use_sliding_window=True",
    "gemma2": "query_pre_attn_scalar=24, not 10",
    "gemma2, without caps": "attention_bias=True",
    "gemma3": "sliding_window_pattern=2",
    "gemma3, capped logits, heads of 256": "sliding_window_pattern=2",
    "smollm3": "no_rope_layers other than 1, 1, 1, 0, ... by turns",
    "smollm3, windows": "use_sliding_window=True",
    "qwen2_moe, normalized, windows, every second layer": "use_sliding_window=True",
    "qwen3_moe, not normalized, window, a plain layer": "use_sliding_window=True",
    "gpt2, untied, scaled by layer": "activation_function='relu'",
    "bert, relu": "hidden_act='relu'",
    "bert, odd widths, tanh gelu": "hidden_act='gelu_new'",
    "roberta, padding token 0": "hidden_act='relu'",
    "distilbert, relu": "activation='relu'",
    "modernbert, with biases, silu": "hidden_activation='silu'",
    "modernbert, windows and rope of its own": "layer_types other than full_attention, sliding_attention, ",
    "t5": "relative_attention_max_distance=20",
    "t5, gelu": "feed_forward_proj='gelu'",
    "t5, gated silu": "feed_forward_proj='gated-silu'",
    **{
        name: f"has architecture '{name.partition(',')[0]}'"
        for name in FEATURES
        if name.partition(",")[0] in ("opt", "mpnet", "albert", "marian")
    },
}


def write(folder: Path, weights: ConvertedWeights = "f32") -> tuple[Checkpoint, Conversion]:
    checkpoint = open_checkpoint(folder)
    output = folder.with_name(f"{folder.name}-{weights}")
    conversion = convert(checkpoint, "gguf", weights, output, find_matrices(checkpoint))
    return open_checkpoint(output), conversion


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_computed_alike_or_refused_by_name(name: str, tmp_path: Path) -> None:
    config = {**FEATURES[name], "vocab_size": 320}
    expected = save(config["model_type"], tmp_path / "model", config)
    if name in REFUSED:
        with pytest.raises(UnsupportedError) as caught:
            write(tmp_path / "model")
        assert REFUSED[name] in str(caught.value)
        return
    written, _ = write(tmp_path / "model")
    assert range_error(compute(written.path, "torch"), expected) < RANGE_BOUND


@pytest.mark.parametrize("model_type", SAID_IN_GGUF)
def test_what_gguf_can_say_of_a_family_is_computed_alike(model_type: str, tmp_path: Path) -> None:
    expected = save(model_type, tmp_path / "model", SAID_IN_GGUF[model_type])
    written, _ = write(tmp_path / "model")
    assert range_error(compute(written.path, "torch"), expected) < RANGE_BOUND
    again = convert(written, "gguf", "auto", tmp_path / "again", find_matrices(written))
    assert not any("rounded" in line for line in again.lines)
    for ours, theirs in zip(
        GGUFReader(tmp_path / "again" / "again.gguf").tensors, library(written), strict=True
    ):
        assert ours.name == theirs.name
        np.testing.assert_allclose(ours.data, theirs.data, rtol=0, atol=2**-23)


def library(written: Checkpoint) -> list[Any]:
    return list(GGUFReader(written.path).tensors)


@pytest.mark.parametrize("model_type", [t for t in CONFIGS if t not in ("opt", "mpnet", "albert", "marian")])
def test_names_and_numbers_are_those_of_the_gguf_library(model_type: str, tmp_path: Path) -> None:
    """In blocks of 8 bits, matrices of experts and transposed ones too; what has no place is told."""
    save(model_type, tmp_path / "model", SAID_IN_GGUF.get(model_type))
    written, conversion = write(tmp_path / "model", "int8")
    theirs = {tensor.name: tensor for tensor in library(written)}
    source = open_checkpoint(tmp_path / "model")
    architecture = GGUFReader(written.path).get_field("general.architecture")
    assert architecture is not None
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.contents())
    assert all_are_known(arch, theirs)
    rounded = 0
    for name, tensor in source.tensors.items():
        place = find_place(source.config, name)
        if place is None or place.name not in theirs:
            assert "left out" in str(conversion.lines)
            continue
        changed, order = change_there(name, tensor, source.config)
        expected = to_f32(changed) if order is None else to_f32(changed)[order]
        there = theirs[place.name]
        values = dequantize(there.data, there.tensor_type)
        values = values if place.expert is None else values[place.expert]
        step = np.abs(expected).max() / 127 if there.tensor_type.name == "Q8_0" else 0.0
        assert np.abs(values.reshape(expected.shape) - expected).max() <= 0.6 * step, name
        rounded += step > 0
    own_heads = model_type == "t5"  # scaled, and of no tensor
    told = [count for (what, _), count in conversion.changes.items() if "rounded to q8_0" in what]
    assert rounded + own_heads == sum(told)
    others = [name for name, tensor in theirs.items() if tensor.tensor_type.name not in ("Q8_0", "F32")]
    assert not others
    matrices = [name for name, t in theirs.items() if len(t.shape) > 1 and t.tensor_type.name == "F32"]
    assert all(any(part in name for part in PLAIN_MATRICES) for name in matrices)


# Tables that are added, and gates of experts: float32 in llama.cpp's own files.
PLAIN_MATRICES = ("position_embd", "token_types", "attn_rel_b", "ffn_gate_inp")


def all_are_known(arch: MODEL_ARCH, names: dict[str, Any]) -> bool:
    known = set(get_tensor_name_map(arch, 8).mapping.values())
    modules = {entry[1] for entry in known}
    return all(name.rpartition(".")[0] in modules for name in names if not name.startswith("rope_"))


# Of a config without `rope_parameters`, what else is changed: keys that are left out, or of other families.
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64}
OLD_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox, nothing said": ("gpt_neox", {}),
    "gpt_neox, base and share": ("gpt_neox", {"rotary_emb_base": 300, "rotary_pct": 0.5}),
    "llama, keys of GPT-NeoX and GPT-2": (
        "llama",
        {"rotary_emb_base": 300, "rotary_pct": 0.5, "n_inner": None},
    ),
    "qwen2, yarn without a factor": ("qwen2", {"rope_scaling": YARN}),
    "llama, yarn with the usual betas": (
        "llama",
        {"rope_scaling": {**YARN, "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "finetuned": True}},
    ),
    "modernbert, keys of others": (
        "modernbert",
        {"rope_theta": 500.0, "rope_local_base_freq": 300.0, "head_dim": {}},
    ),
    "modernbert, its own": ("modernbert", {"global_rope_theta": 500.0, "local_rope_theta": 300.0}),
    "gemma3, its own": ("gemma3_text", {"rope_theta": 500.0, "rope_local_base_freq": 300.0}),
    "distilbert, which has no such key": ("distilbert", {"layer_norm_eps": 0.01}),
    "roberta, no padding token": ("roberta", {"pad_token_id": None}),
    "bert, no list of classes": ("bert", {"architectures": 1}),
}


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_what_a_config_leaves_out_or_says_in_vain_is_written_as_it_is_read(name: str, tmp_path: Path) -> None:
    model_type, changed = OLD_CONFIGS[name]
    save(model_type, tmp_path / "model", SAID_IN_GGUF.get(model_type))
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "rope_parameters"} | changed))
    written, _ = write(tmp_path / "model")
    expected = compute(tmp_path / "model", "torch")
    assert range_error(compute(written.path, "torch"), expected) < RANGE_BOUND


def test_a_window_that_llama_cpp_ignores_is_told(tmp_path: Path) -> None:
    save("mistral", tmp_path / "model", {**CONFIGS["mistral"], "sliding_window": 11})
    written, conversion = write(tmp_path / "model")
    assert written.config["sliding_window"] == 11
    assert conversion.lines[-1].startswith("llama.cpp lets every token of a llama see all others")
    assert "11 tokens" in conversion.lines[-1]
    save("mistral", tmp_path / "whole")
    assert not write(tmp_path / "whole")[1].remarks


def test_a_scaled_head_is_written_as_one_of_its_own(tmp_path: Path) -> None:
    """Which llama.cpp does not scale: width 64, so that an eighth is exact."""
    save("t5", tmp_path / "model", SAID_IN_GGUF["t5"])
    written, _ = write(tmp_path / "model")
    shared = to_f32(open_checkpoint(tmp_path / "model").tensors["shared.weight"])
    assert np.array_equal(to_f32(written.tensors["lm_head.weight"]), shared / 8)
    assert written.config["tie_word_embeddings"] is False


def test_a_classifier_that_decodes_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="a head of classes"):
        write(tmp_path)


def test_a_value_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    save("t5", tmp_path / "model", SAID_IN_GGUF["t5"])
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder_start_token_id": {"a": 1}}))
    with pytest.raises(CheckpointError, match=r"decoder_start_token_id=\{'a': 1\} in its config, a number"):
        write(tmp_path / "model")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    matrices = find_matrices(checkpoint)
    tensors = {name: t for name, t in checkpoint.tensors.items() if "experts.1.w1" not in name}
    checkpoint = Checkpoint(
        path=checkpoint.path,
        format=checkpoint.format,
        config=checkpoint.config,
        tensors=tensors,
        eos_token_ids=checkpoint.eos_token_ids,
        chat_template=None,
        sentence=None,
        metadata=None,
    )
    with pytest.raises(CheckpointError, match=r"the experts in blk\.0\.ffn_gate_exps\.weight"):
        convert(checkpoint, "gguf", "f32", tmp_path / "output", matrices)


UNIGRAMS = {
    "t5": ("spiece.model", "T5Tokenizer", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "xlm-roberta": ("sentencepiece.bpe.model", "XLMRobertaTokenizer", {}),
}


@pytest.mark.parametrize("model_type", UNIGRAMS)
def test_a_unigram_tokenizer_goes_to_gguf_and_back(
    model_type: str, shared_data: Path, tmp_path: Path
) -> None:
    file, class_name, options = UNIGRAMS[model_type]
    config = {**SAID_IN_GGUF.get(model_type, CONFIGS[model_type]), "vocab_size": 800}
    save(model_type, tmp_path / "model", config)
    lines = english_lines(shared_data, 40_000)
    train_pieces(lines, tmp_path / "model" / file, vocab_size=500, **options)
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    written, _ = write(tmp_path / "model")
    ours, theirs = (Tokenizer.from_checkpoint(c) for c in (written, open_checkpoint(tmp_path / "model")))
    for line in [*lines[:50], "  two  spaces ", "Ünïcode ﬁ №42 日本"]:
        assert ours.encode(line) == theirs.encode(line), line
