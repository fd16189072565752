from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastserve.checkpoint import open_checkpoint
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.errors import CheckpointError, OptionError


@pytest.fixture
def folder(shared_data: Path, tmp_path: Path) -> Path:
    """A model of 512 tokens whose config.json and tokenizer.json a test may change."""
    for source in (shared_data / "model_stories260K").iterdir():
        if source.suffix in (".json", ".safetensors"):
            shutil.copyfile(source, tmp_path / source.name)
    return tmp_path


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_model_with_fewer_rows_than_the_tokenizer_has_tokens_is_refused(folder: Path) -> None:
    change(folder / "config.json", vocab_size=511)
    with pytest.raises(CheckpointError, match=r"a tokenizer of 512 tokens and a model of 511.*download"):
        Tokenizer.from_checkpoint(open_checkpoint(folder))


def test_a_model_with_far_more_rows_is_refused_and_with_spare_ones_is_not(folder: Path) -> None:
    change(folder / "config.json", vocab_size=512 + 512)
    assert Tokenizer.from_checkpoint(open_checkpoint(folder)).vocab_size == 512
    change(folder / "config.json", vocab_size=32_000)
    with pytest.raises(CheckpointError, match="512 tokens and a model of 32000"):
        Tokenizer.from_checkpoint(open_checkpoint(folder))


def test_special_tokens_without_a_row_are_refused_only_in_texts(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    image = {**added[0], "id": 512, "content": "<image>", "special": True}
    change(folder / "tokenizer.json", added_tokens=[*added, image])
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(folder))
    assert tokenizer.encode("Once") == [1, 403]
    with pytest.raises(OptionError, match=r"special token '<image>', which the model does not know"):
        tokenizer.encode("Once <image>")
    change(folder / "tokenizer.json", added_tokens=[*added, {**image, "special": False}])
    with pytest.raises(CheckpointError, match="a tokenizer of 513 tokens and a model of 512"):
        Tokenizer.from_checkpoint(open_checkpoint(folder))


def test_a_panic_of_the_library_is_a_named_error(folder: Path) -> None:
    # Rules of normalization that lead out of their trie: read without a check, followed at the first text.
    bad = {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAA="}
    change(folder / "tokenizer.json", normalizer=bad)
    with pytest.raises(CheckpointError):
        Tokenizer.from_checkpoint(open_checkpoint(folder)).encode("Once")
