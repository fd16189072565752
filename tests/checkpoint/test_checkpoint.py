from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastserve.checkpoint import Checkpoint, open_checkpoint
from fastserve.errors import CheckpointError, ModelNotFoundError, UnsupportedError

IM_END = {"content": "<|im_end|>", "special": True}


@pytest.fixture
def open_folder(tmp_path: Path) -> Callable[[dict[str, Any]], Checkpoint]:
    """Open a folder of one tensor, an empty config.json, and the given files (objects as JSON)."""

    def open_(files: dict[str, Any]) -> Checkpoint:
        save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
        for name, content in {"config.json": {}, **files}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return open_checkpoint(tmp_path)

    return open_


def test_a_folder_with_one_gguf_file_opens_that_file(write_tiny_llama: Callable[..., Path]) -> None:
    path = write_tiny_llama()
    assert open_checkpoint(path.parent).path == path


def test_two_gguf_files_must_be_chosen_from(write_tiny_llama: Callable[..., Path]) -> None:
    path = write_tiny_llama()
    (path.parent / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"model.gguf, other.gguf.*name one"):
        open_checkpoint(path.parent)


def test_sentence_transformers_settings_are_read(model_dir: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(model_dir("all-minilm-l6-v2"))
    assert checkpoint.sentence is not None
    assert [module["type"].rsplit(".", 1)[-1] for module in checkpoint.sentence.modules] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    assert checkpoint.sentence.pooling["pooling_mode_mean_tokens"] is True
    assert checkpoint.sentence.max_tokens == 256
    assert checkpoint.tensors["embeddings.LayerNorm.weight"].shape == (384,)
    assert "embeddings.position_ids" not in checkpoint.tensors


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"modules.json": "{}"}, CheckpointError, "is no JSON list of objects"),
        ({"modules.json": [{"idx": 0}]}, CheckpointError, "without type or path"),
        ({"modules.json": [{"type": "x.Pooling", "path": "../.."}]}, CheckpointError, "outside the model"),
        ({"modules.json": [{"type": "x.Pooling", "path": "1_Pooling"}]}, CheckpointError, "cannot be read"),
        (
            {"modules.json": [], "sentence_bert_config.json": {"max_seq_length": "long"}},
            CheckpointError,
            "max_seq_length is 'long'",
        ),
        (
            {"modules.json": [], "sentence_bert_config.json": {"do_lower_case": True}},
            UnsupportedError,
            "do_lower_case",
        ),
        (
            {"modules.json": [], "config_sentence_transformers.json": {"default_prompt_name": "query"}},
            UnsupportedError,
            "prompt 'query'",
        ),
    ],
)  # fmt: skip
def test_sentence_transformers_settings_that_we_cannot_keep_are_refused(
    open_folder: Callable[[dict[str, Any]], Checkpoint],
    files: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        open_folder(files)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 2}}, (2,)),
        ({"config.json": {"eos_token_id": None}}, ()),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [9, 7]}}, (7, 9)),
        (
            {
                "config.json": {"eos_token_id": 0},
                "tokenizer_config.json": {"eos_token": IM_END, "added_tokens_decoder": {"5": IM_END}},
            },
            (0, 5),
        ),
        (
            {
                "config.json": {"eos_token_id": 0},
                "tokenizer_config.json": {
                    "added_tokens_decoder": {"5": IM_END},
                    "chat_template": "{{ m }}<|im_end|>",
                },
            },
            (0, 5),
        ),
    ],
)  # fmt: skip
def test_eos_ids_are_those_of_generation_the_tokenizer_and_the_template(
    open_folder: Callable[[dict[str, Any]], Checkpoint], files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert open_folder(files).eos_token_ids == expected


def test_the_end_of_turn_of_a_gguf_template_is_an_eos_id(write_tiny_llama: Callable[..., Path]) -> None:
    tokens = {"tokenizer.ggml.tokens": ["a", "<eos>", "<|end|>"], "tokenizer.ggml.eos_token_id": 1}
    assert open_checkpoint(write_tiny_llama(metadata=tokens)).eos_token_ids == (1,)
    tokens |= {"tokenizer.chat_template": "{{ m }}<|end|>"}
    assert open_checkpoint(write_tiny_llama(metadata=tokens)).eos_token_ids == (1, 2)


@pytest.mark.parametrize("eos", ["</s>", True, -1, [1, 2.5], {"a": 1}, [[1]]])
def test_an_eos_id_that_is_no_whole_number_is_refused(
    open_folder: Callable[[dict[str, Any]], Checkpoint], eos: object
) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id is"):
        open_folder({"config.json": {"eos_token_id": eos}})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config.json": {"chat_template": "one"}, "chat_template.jinja": "file"}, "file"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "tools"},
                        {"name": "default", "template": "plain"},
                    ]
                }
            },
            "plain",
        ),
    ],
)
def test_the_chat_template_is_found(
    open_folder: Callable[[dict[str, Any]], Checkpoint], files: dict[str, Any], expected: str | None
) -> None:
    assert open_folder(files).chat_template == expected


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsupportedError, match=r"is a pickle.*--allow-pickle"):
            open_checkpoint(path)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no model"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks its config.json.*name its folder"):
        open_checkpoint(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert np.array_equal(open_checkpoint(tmp_path).tensors["a"].data.view("<f4"), [1])
    save_file({"b": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"2 .safetensors files and no model.safetensors.index.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "\ufeff{}", '{"a": 1, "a": 2}'])
def test_a_config_that_is_no_json_object_is_refused(
    open_folder: Callable[[dict[str, Any]], Checkpoint], content: str
) -> None:
    with pytest.raises(CheckpointError, match=r"config.json"):
        open_folder({"config.json": content})
