"""Adapters that peft saves, merged here and by peft."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fastserve.checkpoint import open_checkpoint
from fastserve.checkpoint.adapter import merge_adapter, open_adapter
from fastserve.checkpoint.convert import to_f32
from fastserve.cli.main import main
from fastserve.errors import CheckpointError, ModelNotFoundError, UnsupportedError
from tiny_adapters import make_adapter, make_model

LLAMA = {
    "tie_word_embeddings": False,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rank-stabilized": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "o_proj"], "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"model.layers.1.self_attn.q_proj": 3},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


def make(folder: Path, kind: str, **config: Any) -> Any:
    """A random model in folder/base, with a random adapter in folder/adapter; the model of peft."""
    torch.manual_seed(0)
    classes: dict[str, Any] = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA)),
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2)),
    }  # fmt: skip
    class_, model_config = classes[kind]
    model = class_(model_config)
    model.save_pretrained(folder / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's about transformers, and about what a test asks for
        wrapped = peft.get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return wrapped


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_weights_are_those_of_peft(tmp_path: Path, name: str) -> None:
    kind, config = ADAPTERS[name]
    theirs = make(tmp_path, kind, **config)
    base = open_checkpoint(tmp_path / "base")
    merged = merge_adapter(base, open_adapter(tmp_path / "adapter"))
    expected = theirs.merge_and_unload().state_dict()
    num_changed = 0
    for tensor_name, tensor in merged.tensors.items():
        full = tensor_name if tensor_name in expected else f"transformer.{tensor_name}"
        values = to_f32(tensor)
        assert np.allclose(values, expected[full].numpy(), atol=1e-6), tensor_name
        num_changed += not np.array_equal(values, to_f32(base.tensors[tensor_name]))
        assert np.array_equal(to_f32(tensor.rows(1, 3)), values[1:3])
    assert num_changed == len(open_adapter(tmp_path / "adapter").matrices) > 0


def test_a_converted_model_has_the_adapter_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = make(tmp_path, "llama", target_modules=["q_proj", "v_proj"])
    out = tmp_path / "merged"
    arguments = ["convert", str(tmp_path / "base"), "--to", "safetensors", "--output", str(out)]
    assert main([*arguments, "--adapter", str(tmp_path / "adapter")]) == 0
    ours = transformers.LlamaForCausalLM.from_pretrained(out)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.allclose(ours(ids).logits, expected, atol=1e-5)
        assert not torch.allclose(theirs.get_base_model()(ids).logits + 0.1, expected)
    assert main([*arguments[:-1], str(tmp_path / "other"), "--adapter", str(tmp_path / "nothing")]) == 2
    assert "nothing is no folder" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    make(tmp_path, "llama", target_modules=["q_proj"])
    (tmp_path / "gpt2").mkdir()
    make(tmp_path / "gpt2", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    adapter = open_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj is not there; .*layers.1"):
        merge_adapter(open_checkpoint(tmp_path / "gpt2" / "base"), adapter)


def test_numbers_that_are_none_are_not_merged(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base", "own head")
    make_adapter(tmp_path / "adapter", model, "own head", seed=1)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in ("model.layers.0.self_attn.q_proj.lora_B.weight", "lm_head.weight"):
        tensors[f"base_model.model.{name}"][0, 0] = np.nan
    save_file(tensors, path)
    both = r"lm_head\.weight has numbers that are not finite; .*q_proj has numbers that are not finite"
    with pytest.raises(CheckpointError, match=both):
        merge_adapter(open_checkpoint(tmp_path / "base"), open_adapter(tmp_path / "adapter"))


def test_a_merged_model_has_the_layers_that_the_adapter_has_in_place_of_its_own(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base", "own head")
    theirs = make_adapter(tmp_path / "adapter", model, "own head", seed=1)
    merged = merge_adapter(open_checkpoint(tmp_path / "base"), open_adapter(tmp_path / "adapter"))
    expected = theirs.merge_and_unload().state_dict()
    assert merged.tensors["lm_head.weight"].name == "lm_head.weight"
    for name, tensor in merged.tensors.items():
        np.testing.assert_allclose(to_f32(tensor), expected[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
    base = open_checkpoint(tmp_path / "base")
    heads = [to_f32(model.tensors["lm_head.weight"]) for model in (merged, base)]
    assert not np.array_equal(*heads)
    tied = replace(base, tensors={n: t for n, t in base.tensors.items() if n != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not there \(its head is its embedding\)"):
        merge_adapter(tied, open_adapter(tmp_path / "adapter"))


def test_a_dora_adapter_of_an_embedding_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path, "llama", target_modules=["embed_tokens", "q_proj"], use_dora=True)
    with pytest.raises(UnsupportedError, match=r"DoRA adapter of the embedding model\.embed_tokens"):
        open_adapter(tmp_path / "adapter")


def test_a_dora_adapter_of_transposed_matrices_is_not_merged(tmp_path: Path) -> None:
    make(tmp_path, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    with pytest.raises(UnsupportedError, match="stored transposed: it is not merged"):
        merge_adapter(open_checkpoint(tmp_path / "base"), open_adapter(tmp_path / "adapter"))


def change(folder: Path) -> Callable[..., None]:
    path = folder / "adapter" / "adapter_config.json"

    def write(**values: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return write


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "of type 'IA3', supported is LORA"),
        ({"bias": "all"}, UnsupportedError, "bias='all'"),
        ({"modules_to_save": "lm_head"}, CheckpointError, "modules_to_save='lm_head', a list of names"),
        ({"lora_bias": True}, UnsupportedError, "lora_bias=True"),
        ({"layer_replication": [[0, 1]]}, UnsupportedError, "layer_replication="),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "'pissa', which changes the model itself"),
        ({"a_setting_to_come": 7}, UnsupportedError, "a_setting_to_come=7"),
        ({"use_dora": True}, CheckpointError, "use_dora and the tensors of .* contradict"),
        ({"lora_alpha": "x"}, CheckpointError, "lora_alpha='x', a number was expected"),
        ({"alpha_pattern": ["q_proj"]}, CheckpointError, r"alpha_pattern=\['q_proj'\], an object"),
        ({"alpha_pattern": {"(a+)+$": 1}}, UnsupportedError, "supported are names of modules"),
    ],
)
def test_what_an_adapter_has_beyond_matrices_is_refused_by_name(
    tmp_path: Path, values: dict[str, Any], error: type[Exception], says: str
) -> None:
    make(tmp_path, "llama", target_modules=["q_proj"])
    change(tmp_path)(**values)
    with pytest.raises(error, match=says):
        open_adapter(tmp_path / "adapter")


def test_missing_files_and_pickles_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is no folder"):
        open_adapter(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"adapter_config.json cannot be read"):
        open_adapter(tmp_path)
    make(tmp_path, "llama", target_modules=["q_proj"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnsupportedError, match="pickle"):
        open_adapter(tmp_path / "adapter")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make(folder, "llama", target_modules=["q_proj"])
    return folder


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_work_within_a_second(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    for path in (whole / "adapter").glob("adapter_*"):
        damaged = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4)) if path.name == name else 0):
            at = data.draw(st.integers(0, min(len(damaged), 700) - 1))
            damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        (folder / path.name).write_bytes(damaged)
    start = time.process_time()
    with suppress(CheckpointError, UnsupportedError):
        merged = merge_adapter(open_checkpoint(whole / "base"), open_adapter(folder))
        to_f32(merged.tensors["model.layers.0.self_attn.q_proj.weight"])
    assert time.process_time() - start < 1
