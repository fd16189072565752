"""Decoder families in GGUF: tiny models of `transformers`, written by the `gguf` library as llama.cpp's
converter writes them, against the same models there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map, quants

from decoder_configs import DECODERS, GEMMA3, LLAMA, Config
from fastserve.checkpoint.checkpoint import open_checkpoint
from fastserve.checkpoint.convert import to_f32
from fastserve.errors import CheckpointError, UnsupportedError
from fastserve.models.family import arrange_tensors, read_config
from fastserve.types import Float32Array
from parity import RANGE_BOUND, compile_graph, load_model, range_error, run_logits
from tiny_models import random_language_model

PROMPT: list[int] = np.random.default_rng(5).integers(0, 97, 50).tolist()

_SCALED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
FAMILIES: dict[str, tuple[str, Config]] = {
    "llama": ("llama", LLAMA),
    "mistral, window": ("llama", DECODERS["mistral, window"]),
    "qwen2": ("qwen2", DECODERS["qwen2"]),
    "qwen3": ("qwen3", DECODERS["qwen3"]),
    "mixtral": ("llama", DECODERS["mixtral"]),
    "qwen2_moe": ("qwen2moe", DECODERS["qwen2_moe"]),
    "qwen3_moe": ("qwen3moe", DECODERS["qwen3_moe"]),
    "gemma": ("gemma", DECODERS["gemma"]),
    "gemma2": ("gemma2", {**DECODERS["gemma2"], "query_pre_attn_scalar": 10}),
    # What GGUF does not say, and is so in llama.cpp: every sixth layer sees all, windows turn by 10,000.
    "gemma3": (
        "gemma3",
        {
            **GEMMA3,
            "query_pre_attn_scalar": 10,
            "num_hidden_layers": 7,
            "sliding_window_pattern": 6,
            "rope_parameters": {
                "full_attention": _SCALED,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3, window, partial rotary": ("phi3", DECODERS["phi3, window, partial rotary"]),
    "phi3, longrope": ("phi3", DECODERS["phi3, longrope"]),
    "smollm3": ("smollm3", {**DECODERS["smollm3"], "no_rope_layer_interval": 4}),
    "gpt2": ("gpt2", DECODERS["gpt2"]),
    "gpt_neox": ("gptneox", DECODERS["gpt_neox"]),
    "gpt_neox, one after the other": ("gptneox", {**DECODERS["gpt_neox"], "use_parallel_residual": False}),
}


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    without: tuple[str, ...] = (),
) -> None:
    """What convert_hf_to_gguf.py writes, without a tokenizer."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    add_metadata(writer, architecture, config)
    arch = next(arch for arch, name in ARCHITECTURES.items() if name == architecture)
    to_gguf = get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in split_experts(model.state_dict()):
        if name in ("lm_head.weight", "embed_out.weight") and config.tie_word_embeddings:
            continue
        there = to_gguf.get_name(name, (".weight", ".bias"))
        assert there is not None, name
        values = arrange(architecture, name, tensor.numpy(), config)
        stored = kind if values.ndim > 1 else GGMLQuantizationType.F32
        if there not in without:
            writer.add_tensor(there, quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    parameters = getattr(config, "rope_parameters", None) or {}
    for key in ("long", "short"):
        if f"{key}_factor" in parameters:
            writer.add_tensor(f"rope_factors_{key}.weight", np.array(parameters[f"{key}_factor"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split_experts(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Transformers 5 holds gates and ups of all experts in one tensor [experts, 2 * width, hidden]; the
    format has one for each [experts, width, hidden]."""
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", tensor
        else:
            yield name, tensor


ARCHITECTURES = {
    MODEL_ARCH.LLAMA: "llama",
    MODEL_ARCH.QWEN2: "qwen2",
    MODEL_ARCH.QWEN3: "qwen3",
    MODEL_ARCH.QWEN2MOE: "qwen2moe",
    MODEL_ARCH.QWEN3MOE: "qwen3moe",
    MODEL_ARCH.GEMMA: "gemma",
    MODEL_ARCH.GEMMA2: "gemma2",
    MODEL_ARCH.GEMMA3: "gemma3",
    MODEL_ARCH.PHI3: "phi3",
    MODEL_ARCH.SMOLLM3: "smollm3",
    MODEL_ARCH.GPT2: "gpt2",
    MODEL_ARCH.GPTNEOX: "gptneox",
}


def add_metadata(writer: GGUFWriter, architecture: str, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    parameters = config.rope_parameters.get("full_attention", config.rope_parameters)
    rotary = int(parameters.get("partial_rotary_factor", 1.0) * head_dim)
    writer.add_rope_dimension_count(rotary)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if architecture == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if getattr(config, "sliding_window", None) and not architecture.startswith("qwen"):
        writer.add_sliding_window(config.sliding_window)
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] == "longrope":
        original = parameters["original_max_position_embeddings"]
        factor = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(np.sqrt(1 + np.log(factor) / np.log(original)))
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def arrange(architecture: str, name: str, values: Float32Array, config: Any) -> Float32Array:
    if architecture in ("llama", "smollm3") and name.split(".")[-2] in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    if name.endswith("shared_expert_gate.weight"):
        return values.reshape(-1)
    if architecture == "gptneox" and "query_key_value" in name:
        heads = config.num_attention_heads
        by_head = values.reshape(heads, 3, config.hidden_size // heads, *values.shape[1:])
        return by_head.swapaxes(0, 1).reshape(values.shape)
    return values


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_in_gguf_computes_what_it_does_in_transformers(name: str, tmp_path: Path) -> None:
    import torch

    architecture, config = FAMILIES[name]
    model = random_language_model(config)
    write_gguf(tmp_path / "model.gguf", architecture, model)
    with torch.no_grad():
        expected = np.asarray(model(torch.tensor([PROMPT])).logits[0].numpy())
    graph, parameters = load_model(tmp_path / "model.gguf")
    assert range_error(run_logits(compile_graph("torch", graph, parameters), PROMPT), expected) < RANGE_BOUND


@pytest.mark.parametrize("name", FAMILIES)
def test_names_config_and_tensors_are_those_that_transformers_saves(name: str, tmp_path: Path) -> None:
    architecture, config = FAMILIES[name]
    model = random_language_model(config)
    write_gguf(tmp_path / "model.gguf", architecture, model)
    model.save_pretrained(tmp_path / "folder")
    file, folder = open_checkpoint(tmp_path / "model.gguf"), open_checkpoint(tmp_path / "folder")
    there = {
        key.replace("lm_head", "embed_out") if architecture == "gptneox" else key for key in folder.tensors
    }
    assert set(file.tensors) == there
    for key, tensor in folder.tensors.items():
        here = file.tensors[key.replace("lm_head", "embed_out") if architecture == "gptneox" else key]
        np.testing.assert_allclose(to_f32(here), to_f32(tensor), rtol=0, atol=2**-23, err_msg=key)
    if "longrope" not in name:  # whose scale is stored, rounded to float32
        assert read_config(file.config) == read_config(folder.config)


@pytest.mark.parametrize(("architecture", "name"), [("gpt2", "gpt2"), ("gptneox", "gpt_neox")])
def test_blocks_reach_the_graph_as_they_are_stored(architecture: str, name: str, tmp_path: Path) -> None:
    """Conversion had transposed and regrouped matrices before it rounded them: nothing is rounded again."""
    size = {} if architecture == "gpt2" else {"intermediate_size": 64}
    model = random_language_model({**DECODERS[name], **size})
    write_gguf(tmp_path / "model.gguf", architecture, model, GGMLQuantizationType.Q8_0)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    tensors = arrange_tensors(read_config(checkpoint.config), checkpoint.tensors)
    fused = next(key for key in tensors if key.endswith(("c_attn.weight", "query_key_value.weight")))
    values = model.state_dict()[fused].numpy()
    if architecture == "gptneox":
        values = values.reshape(4, 3, 8, 32).swapaxes(0, 1).reshape(96, 32)
    else:
        values = np.ascontiguousarray(values.T)
    stored = quants.quantize(values, GGMLQuantizationType.Q8_0)
    assert tensors[fused].format.value == "q8_0"
    assert tensors[fused].data.tobytes() == stored.tobytes()
    assert tensors[fused].rows(5, 40).data.tobytes() == stored[5:40].tobytes()


def test_a_window_beside_biases_is_refused(tmp_path: Path) -> None:
    model = random_language_model({**LLAMA, "attention_bias": True})
    model.config.sliding_window = 11
    write_gguf(tmp_path / "model.gguf", "llama", model)
    with pytest.raises(UnsupportedError, match="window of 11 tokens beside attention_bias"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_rope_scaling_without_its_factors_is_named(tmp_path: Path) -> None:
    model = random_language_model(DECODERS["phi3, longrope"])
    del model.config.rope_parameters["short_factor"]
    write_gguf(tmp_path / "model.gguf", "phi3", model)
    with pytest.raises(CheckpointError, match=r"rope_factors_short\.weight"):
        open_checkpoint(tmp_path / "model.gguf")


def test_an_architecture_that_we_lack_is_named_with_those_we_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf", "gpt2", random_language_model(DECODERS["gpt2"]))
    text = (
        (tmp_path / "model.gguf")
        .read_bytes()
        .replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0mamb", 1)
    )
    (tmp_path / "model.gguf").write_bytes(text)
    with pytest.raises(
        UnsupportedError, match="'mamb', supported in GGUF are llama, bert, modern-bert, t5, qwen2, "
    ) as caught:
        open_checkpoint(tmp_path / "model.gguf")
    assert caught.value.hint == "docs/guides/add-a-model.md says how to add one"
