"""Reads the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from fastserve.checkpoint.file import read_bytes, read_optional_json
from fastserve.checkpoint.tokenizer_library import name_errors
from fastserve.errors import UnsupportedError
from fastserve.types import JsonObject

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def build_from_folder(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of tokenizer.json, and the special tokens of tokenizer_config.json by role.

    Which of them surround a text is for tokenizer.json to say, as in transformers 5: `add_bos_token` and
    `add_eos_token` of tokenizer_config.json count for nothing beside it.

    Raises:
        CheckpointError: a file is corrupt.
        UnsupportedError: there is no tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedError(
            f"{folder} has no tokenizer.json, the only form of tokenizer supported in a folder",
            hint="transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it",
        )
    text = read_bytes(path)
    with name_errors(path):
        backend = Tokenizer.from_buffer(text)
        backend.encode("")  # a template of special tokens that names a missing one panics only here
    special_tokens_map = read_optional_json(folder / "special_tokens_map.json")
    config = read_optional_json(folder / "tokenizer_config.json")
    return backend, _special_tokens({**special_tokens_map, **config})


def _special_tokens(named: JsonObject) -> dict[str, str]:
    """A special token is a text, or an object with its content."""
    found = {}
    for role in _ROLES:
        token = named.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[role] = content
    return found
