"""Reads the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models

from fastserve.checkpoint.file import read_bytes, read_optional_json
from fastserve.checkpoint.legacy_tokenizer import build_from_legacy_files
from fastserve.checkpoint.tokenizer_library import name_errors, special_tokens
from fastserve.checkpoint.tokenizer_limits import check_rules


def build_from_folder(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of tokenizer.json, and the special tokens of tokenizer_config.json by role; without that
    file, the tokenizer of the older ones (`legacy_tokenizer`).

    Which of them surround a text is for tokenizer.json to say, as in transformers 5: `add_bos_token` and
    `add_eos_token` of tokenizer_config.json count for nothing beside it.

    Raises:
        CheckpointError: a file is corrupt.
        UnsupportedError: there are no files of a tokenizer that we know.
    """
    config = {
        **read_optional_json(folder / "special_tokens_map.json"),
        **read_optional_json(folder / "tokenizer_config.json"),
    }
    path = folder / "tokenizer.json"
    if not path.is_file():
        return build_from_legacy_files(folder, config)
    text = read_bytes(path)
    with name_errors(path):
        backend = Tokenizer.from_buffer(text)
        backend.encode("")  # a template of special tokens that names a missing one panics only here
        check_rules(backend, path)
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None  # chance of a merge left out, which is for training
    return backend, special_tokens(config)
