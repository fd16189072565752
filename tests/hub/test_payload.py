from __future__ import annotations

import pytest

from fastserve.errors import DownloadError
from fastserve.hub.payload import choose_payload


def test_the_model_is_found_wherever_the_package_keeps_it() -> None:
    names = [
        "pkg/__init__.py",
        "pkg/cli.py",
        "pkg/model/README.md",
        "pkg/model/config.json",
        "pkg/model/model.safetensors",
        "pkg/model/tokenizer.json",
        "pkg/model/1_Pooling/config.json",
        "pkg-1.dist-info/METADATA",
    ]
    assert choose_payload(names) == {
        "config.json": "pkg/model/config.json",
        "model.safetensors": "pkg/model/model.safetensors",
        "tokenizer.json": "pkg/model/tokenizer.json",
        "1_Pooling/config.json": "pkg/model/1_Pooling/config.json",
    }


def test_a_gguf_file_alone_is_a_model() -> None:
    assert choose_payload(["pkg/m.gguf", "pkg/__init__.py"]) == {"m.gguf": "pkg/m.gguf"}


def test_weights_without_a_config_are_no_model() -> None:
    assert choose_payload(["pkg/adapter.safetensors", "pkg/__init__.py"]) == {}


def test_the_same_weights_in_other_formats_stay_out() -> None:
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "model.q8.gguf",
        "model.q4.gguf",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "onnx/config.json",
    ]
    assert list(choose_payload(names)) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_packed_weights_come_with_the_floats_beside_them() -> None:
    names = ["config.json", "fastserve.json", "fastserve.safetensors", "model.safetensors", "tokenizer.json"]
    assert sorted(choose_payload([*names, "consolidated.safetensors"])) == names
    archive = ["config.json", "fastserve-archive.safetensors", "tokenizer.json"]
    assert sorted(choose_payload(archive)) == archive


def test_several_gguf_files_are_not_chosen_from_silently() -> None:
    with pytest.raises(DownloadError, match=r"2 \.gguf files to choose from: q4\.gguf, q8\.gguf"):
        choose_payload(["q4.gguf", "q8.gguf"])


def test_both_tokenizers_of_a_translator_are_of_the_model() -> None:
    names = ["config.json", "model.safetensors", "source.spm", "target.spm", "target_vocab.json"]
    names += ["tf_model.h5", "vocab.json"]
    assert list(choose_payload(names)) == [name for name in names if name != "tf_model.h5"]
